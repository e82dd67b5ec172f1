//! One configuration from defaults, a TOML file, the environment and flags.
//!
//! The keys of the default value are the keys that exist: a configuration type serializes all its
//! fields (`None` included) and gives an empty map where keys are free.

use std::path::{Path, PathBuf};

use figment::Figment;
use figment::providers::{Format as _, Serialized, Toml};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Most values of a wrong type that are reported at once.
const TYPE_FAULTS_MAX: usize = 64;

/// One thing that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The key, dotted: `server.calls_max`. Empty: the whole.
    pub key: String,
    /// What is wrong and what would be right.
    pub message: String,
}

impl Fault {
    /// A fault of this key.
    pub fn new(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self { key: key.into(), message: message.into() }
    }

    /// A fault for a number outside `min..=max`; nothing for one inside.
    pub fn unless_within(key: &str, value: u64, min: u64, max: u64) -> Option<Self> {
        let is_within = (min..=max).contains(&value);
        (!is_within).then(|| Self::new(key, format!("{value} is outside {min}..={max}")))
    }
}

/// Checks that types alone cannot express: bounds, and how keys fit together.
pub trait Validate {
    /// All faults; empty if there is none.
    fn validate(&self) -> Vec<Fault>;
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Everything that is wrong.
    #[error("{} in the configuration:{}", plural(faults.len()), lines(faults))]
    Faults {
        /// At least one.
        faults: Vec<Fault>,
    },
}

fn plural(count: usize) -> String {
    if count == 1 { "1 fault".to_owned() } else { format!("{count} faults") }
}

fn lines(faults: &[Fault]) -> String {
    let line = |fault: &Fault| match fault.key.as_str() {
        "" => format!("\n  {}", fault.message),
        key => format!("\n  {key}: {}", fault.message),
    };
    faults.iter().map(line).collect()
}

/// Loads a configuration: defaults, then `file`, then environment variables, then `flags` (a serde
/// value whose absent or null fields change nothing). What comes later wins.
///
/// With the prefix `APP`, `APP_DATA_DIR` is the key `data_dir`, and `APP__server__calls_max` (or
/// `APP_SERVER__CALLS_MAX`) is the key `calls_max` in the table `server`. Every variable that
/// begins with `APP_` is taken for a key, so a typing error in it is found too.
///
/// # Errors
/// Unknown keys, values of the wrong type, and what [`Validate`] finds: all at once where possible.
pub fn load<T>(
    file: Option<&Path>,
    env_prefix: &str,
    flags: &impl Serialize,
) -> Result<T, ConfigError>
where
    T: Default + Serialize + DeserializeOwned + Validate,
{
    // A variable that is not Unicode cannot be one of ours.
    let env = std::env::vars_os().filter_map(|(name, value)| {
        Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
    });
    load_with_env(file, env_prefix, env, flags)
}

/// [`load`] with the environment given as pairs of name and value.
///
/// # Errors
/// As [`load`].
pub fn load_with_env<T>(
    file: Option<&Path>,
    env_prefix: &str,
    env: impl IntoIterator<Item = (String, String)>,
    flags: &impl Serialize,
) -> Result<T, ConfigError>
where
    T: Default + Serialize + DeserializeOwned + Validate,
{
    let mut faults = Vec::new();
    let defaults = to_value(&T::default(), &mut faults);
    let mut figment = Figment::from(Serialized::defaults(&defaults));
    if let Some(path) = file {
        let read = std::fs::read_to_string(path);
        let text = read.map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let source = path.display().to_string();
        match Figment::from(Toml::string(&text)).extract::<Value>() {
            Ok(mut value) => {
                drop_unknown_keys(&defaults, &mut value, "", &source, &mut faults);
                figment = figment.merge(Serialized::globals(&value));
            }
            Err(error) => faults.push(Fault::new("", format!("{source}: {}", error.kind))),
        }
    }
    for (name, text) in env {
        let Some(key) = env_key(env_prefix, &name) else { continue };
        match at(&defaults, &key) {
            Some(default) => figment = figment.merge((key, env_value(default, &text))),
            None => faults.push(Fault::new(key, format!("unknown key (in the variable {name})"))),
        }
    }
    if let Some(mut flags) = without_nulls(to_value(flags, &mut faults)) {
        drop_unknown_keys(&defaults, &mut flags, "", "the flags", &mut faults);
        figment = figment.merge(Serialized::globals(&flags));
    }
    let config = extract::<T>(figment, &defaults, &mut faults);
    if let Some(config) = &config {
        faults.extend(config.validate());
    }
    match config {
        Some(config) if faults.is_empty() => Ok(config),
        _ => Err(ConfigError::Faults { faults }),
    }
}

fn to_value(source: &impl Serialize, faults: &mut Vec<Fault>) -> Value {
    serde_json::to_value(source).unwrap_or_else(|error| {
        faults.push(Fault::new("", error.to_string()));
        Value::Null
    })
}

/// Reads the merged values. A value of the wrong type is reported and its default taken, so that
/// the next one is found too. `None` only with faults.
fn extract<T: DeserializeOwned>(
    mut figment: Figment,
    defaults: &Value,
    faults: &mut Vec<Fault>,
) -> Option<T> {
    for _ in 0..TYPE_FAULTS_MAX {
        let error = match figment.extract::<T>() {
            Ok(config) => return Some(config),
            Err(error) => error,
        };
        let key = error.path.join(".");
        let is_new = !faults.iter().any(|fault| fault.key == key);
        faults.push(Fault::new(key.clone(), error.kind.to_string()));
        match at(defaults, &key) {
            Some(default) if is_new => figment = figment.merge((key, default.clone())),
            // Nothing to put in its place: what lies behind it stays unseen for now.
            _ => return None,
        }
    }
    None
}

fn env_key(prefix: &str, name: &str) -> Option<String> {
    let rest = name.strip_prefix(prefix)?.strip_prefix('_')?;
    let rest = rest.strip_prefix('_').unwrap_or(rest);
    let key = rest.split("__").collect::<Vec<_>>().join(".").to_ascii_lowercase();
    (!key.is_empty()).then_some(key)
}

/// A variable is text; what it means depends on what the key holds by default.
fn env_value(default: &Value, text: &str) -> figment::value::Value {
    match default {
        Value::String(_) => figment::value::Value::from(text),
        _ => match text.parse() {
            Ok(value) => value,
            Err(never) => match never {},
        },
    }
}

fn at<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    key.split('.').try_fold(value, |value, part| match value {
        Value::Object(table) => table.get(part),
        _ => None,
    })
}

/// Takes out and reports the keys that `known` does not have.
fn drop_unknown_keys(
    known: &Value,
    given: &mut Value,
    above: &str,
    source: &str,
    faults: &mut Vec<Fault>,
) {
    let (Value::Object(known), Value::Object(given)) = (known, given) else { return };
    if known.is_empty() {
        // A table with free keys.
        return;
    }
    given.retain(|name, value| {
        let key = if above.is_empty() { name.clone() } else { format!("{above}.{name}") };
        let inner = known.get(name);
        match inner {
            Some(inner) => drop_unknown_keys(inner, value, &key, source, faults),
            None => faults.push(Fault::new(key, format!("unknown key (in {source})"))),
        }
        inner.is_some()
    });
}

fn without_nulls(value: Value) -> Option<Value> {
    match value {
        Value::Null => None,
        Value::Object(table) => {
            let kept = |(key, value)| Some((key, without_nulls(value)?));
            let table: Map<_, _> = table.into_iter().filter_map(kept).collect();
            (!table.is_empty()).then_some(Value::Object(table))
        }
        other => Some(other),
    }
}

/// Logs the effective configuration once, as TOML at INFO, with secrets blanked out.
pub fn log_effective(config: &impl Serialize) {
    tracing::info!(config = %effective(config), "effective configuration");
}

/// The configuration as TOML. Text under a key that names a secret (`…secret`, `…password`,
/// `…_key`, `key`, `…token`) is printed as `<redacted>`; a path under `…_file` is not one.
#[must_use]
pub fn effective(config: &impl Serialize) -> String {
    let printed = serde_json::to_value(config).map_err(|error| error.to_string());
    let printed = printed.and_then(|mut value| {
        redact(&mut value);
        let value = without_nulls(value).unwrap_or(Value::Object(Map::new()));
        toml::to_string(&value).map_err(|error| error.to_string())
    });
    printed.unwrap_or_else(|error| format!("# cannot be printed: {error}"))
}

fn redact(value: &mut Value) {
    match value {
        Value::Object(table) => {
            for (key, value) in table.iter_mut() {
                match value {
                    Value::String(text) if is_secret(key) && !text.is_empty() => {
                        "<redacted>".clone_into(text);
                    }
                    Value::Array(_) if is_secret(key) => *value = Value::from("<redacted>"),
                    other => redact(other),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(redact),
        _ => {}
    }
}

fn is_secret(key: &str) -> bool {
    key == "key" || ["secret", "password", "_key", "token"].iter().any(|end| key.ends_with(end))
}

#[cfg(test)]
mod tests;
