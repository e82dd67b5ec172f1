#![allow(clippy::unwrap_used)]

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::*;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct App {
    data_dir: String,
    hmac_key: String,
    backlog_max: u64,
    peer: Option<String>,
    server: Server,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Server {
    calls_max: u32,
    timeout_ms: u64,
}

impl Default for App {
    fn default() -> Self {
        Self {
            data_dir: "/data".to_owned(),
            hmac_key: "hunter2".to_owned(),
            backlog_max: 10,
            peer: None,
            server: Server::default(),
        }
    }
}

impl Default for Server {
    fn default() -> Self {
        Self { calls_max: 7, timeout_ms: 1000 }
    }
}

impl Validate for App {
    fn validate(&self) -> Vec<Fault> {
        Fault::unless_within("backlog_max", self.backlog_max, 1, 100).into_iter().collect()
    }
}

fn load_app(file: &str, env: &[(&str, &str)], flags: Value) -> Result<App, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("app.toml");
    std::fs::write(&path, file).unwrap();
    let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    load_with_env(Some(&path), "APP", env, &flags)
}

fn faults(result: Result<App, ConfigError>) -> Vec<String> {
    match result.unwrap_err() {
        ConfigError::Faults { faults } => faults.into_iter().map(|fault| fault.key).collect(),
        other => panic!("{other}"),
    }
}

#[test]
fn flags_win_over_environment_over_file_over_defaults() {
    let file = "data_dir = 'file'\nbacklog_max = 20\n[server]\ncalls_max = 20\ntimeout_ms = 20\n";
    let env = [("APP_BACKLOG_MAX", "30"), ("APP__server__calls_max", "30"), ("OTHER_X", "1")];
    let app = load_app(file, &env, json!({"server": {"calls_max": 40}, "peer": null})).unwrap();
    assert_eq!(app.hmac_key, "hunter2");
    assert_eq!((app.data_dir.as_str(), app.server.timeout_ms), ("file", 20));
    assert_eq!((app.backlog_max, app.server.calls_max), (30, 40));
    assert_eq!(app.peer, None);
}

#[test]
fn without_file_environment_and_flags_the_defaults_stand() {
    assert_eq!(load_app("", &[], Value::Null).unwrap(), App::default());
}

#[test]
fn an_unknown_key_is_refused_wherever_it_stands() {
    assert_eq!(faults(load_app("data_dri = 'x'", &[], Value::Null)), ["data_dri"]);
    assert_eq!(faults(load_app("[server]\nfoo = 1", &[], Value::Null)), ["server.foo"]);
    assert_eq!(faults(load_app("", &[("APP_DATA_DRI", "x")], Value::Null)), ["data_dri"]);
    assert_eq!(faults(load_app("", &[], json!({"foo": 1}))), ["foo"]);
}

#[test]
fn all_faults_are_reported_at_once() {
    let file = "foo = 1\nbacklog_max = 'many'\n[server]\ntimeout_ms = -1\n";
    let keys = faults(load_app(file, &[("APP_BAR", "1")], json!({"server": {"calls_max": "x"}})));
    assert_eq!(keys, ["foo", "bar", "backlog_max", "server.calls_max", "server.timeout_ms"]);
    let keys = faults(load_app("foo = 1\nbacklog_max = 101", &[], Value::Null));
    assert_eq!(keys, ["foo", "backlog_max"]);
}

#[test]
fn a_table_in_place_of_a_number_is_refused() {
    assert_eq!(faults(load_app("[backlog_max]\nx = 1", &[], Value::Null)), ["backlog_max"]);
    assert_eq!(faults(load_app("server = 3", &[], Value::Null)), ["server"]);
}

#[test]
fn bounds_hold_on_both_sides() {
    assert!(load_app("backlog_max = 100", &[], Value::Null).is_ok());
    assert!(load_app("backlog_max = 1", &[], Value::Null).is_ok());
    assert_eq!(faults(load_app("backlog_max = 0", &[], Value::Null)), ["backlog_max"]);
}

#[test]
fn text_that_looks_like_a_number_stays_text_where_text_is_wanted() {
    let app = load_app("", &[("APP_DATA_DIR", "123")], Value::Null).unwrap();
    assert_eq!(app.data_dir, "123");
}

#[test]
fn broken_toml_and_a_missing_file_are_refused() {
    assert_eq!(faults(load_app("data_dir = ", &[], Value::Null)), [""]);
    let missing = load_with_env::<App>(Some(Path::new("/nonexistent")), "APP", [], &Value::Null);
    assert!(matches!(missing, Err(ConfigError::Read { .. })));
}

#[test]
fn the_effective_configuration_hides_secrets() {
    let text = effective(&App::default());
    assert!(!text.contains("hunter2"), "{text}");
    assert!(text.contains("hmac_key = \"<redacted>\""), "{text}");
    assert!(text.contains("calls_max = 7"), "{text}");
}
