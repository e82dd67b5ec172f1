//! What every configuration promises: all of its keys can be set, and a value that would break what the
//! service promises is refused before anything is touched.
use std::collections::BTreeSet;

use endio_chassis::config::Validate;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Nothing is logged, recorded or remembered.
const TELEMETRY: [&str; 6] = [
    "telemetry.trace.ratio",
    "telemetry.trace.ring_spans",
    "telemetry.recorder.spans_max",
    "telemetry.recorder.bytes_max",
    // Every write counts as slow.
    "telemetry.trace.slow_ms",
    "telemetry.recorder.slow_ms",
];

/// Calls `with` for every key that is not a table, and for every table, with its place in the whole.
fn walk(value: &Value, above: &str, with: &mut impl FnMut(&str, &Value)) {
    if let Value::Object(table) = value {
        for (name, inner) in table {
            let key = if above.is_empty() { name.clone() } else { format!("{above}.{name}") };
            with(&key, inner);
            walk(inner, &key, with);
        }
    }
}

fn at<'a>(value: &'a mut Value, key: &str) -> &'a mut Value {
    key.split('.').filter(|part| !part.is_empty()).fold(value, |value, part| &mut value[part])
}

/// The names that a table knows: what it says when it is given one that it does not know.
fn known<T: DeserializeOwned>(defaults: &Value, key: &str) -> Option<BTreeSet<String>> {
    let mut value = defaults.clone();
    at(&mut value, key).as_object_mut()?.insert("no_such_key".to_owned(), Value::Null);
    let told = serde_json::from_value::<T>(value).err()?.to_string();
    let (_, names) = told.split_once("unknown field `no_such_key`, expected")?;
    Some(names.split('`').skip(1).step_by(2).map(str::to_owned).collect())
}

fn names(table: &Map<String, Value>) -> BTreeSet<String> {
    table.keys().cloned().collect()
}

/// The keys that exist are those of the serialized default: see `endio_chassis::config`.
fn every_key_is_serialized<T: Default + Serialize + DeserializeOwned>() {
    let defaults = serde_json::to_value(T::default()).unwrap();
    let mut tables = vec![String::new()];
    walk(&defaults, "", &mut |key, value| {
        // An empty one has free keys.
        if value.as_object().is_some_and(|table| !table.is_empty()) {
            tables.push(key.to_owned());
        }
    });
    assert!(tables.len() > 3, "{tables:?}");
    for key in tables {
        let known = known::<T>(&defaults, &key).unwrap_or_else(|| panic!("`{key}` takes any key"));
        let mut defaults = defaults.clone();
        assert_eq!(names(at(&mut defaults, &key).as_object().unwrap()), known, "in `{key}`");
    }
}

/// Sets each number to 0 in turn: it is named as a fault unless it is one of those that mean something.
fn zero_is_refused_except_in<T>(means_something: &[&str])
where
    T: Default + Serialize + DeserializeOwned + Validate,
{
    let defaults = serde_json::to_value(T::default()).unwrap();
    let mut numbers = Vec::new();
    walk(&defaults, "", &mut |key, value| {
        if value.is_number() {
            numbers.push(key.to_owned());
        }
    });
    let mut taken = BTreeSet::new();
    for key in numbers {
        let mut value = defaults.clone();
        *at(&mut value, &key) = Value::from(0);
        let faults = serde_json::from_value::<T>(value).unwrap().validate();
        if !faults.iter().any(|fault| fault.key == key) {
            taken.insert(key);
        }
    }
    let expected = means_something.iter().chain(&TELEMETRY).map(|key| (*key).to_owned());
    assert_eq!(taken, expected.collect::<BTreeSet<_>>());
}

#[test]
fn every_key_of_every_service_can_be_set() {
    every_key_is_serialized::<endio_conversion::Config>();
    every_key_is_serialized::<endio_block_store::Config>();
    every_key_is_serialized::<endio_writeback::Config>();
}

#[test]
fn conversion_refuses_zero_where_it_does_not_mean_none() {
    zero_is_refused_except_in::<endio_conversion::Config>(&[
        "server.worker_threads",
        // Never.
        "commit_here_us_max",
    ]);
}

#[test]
fn a_block_store_refuses_zero_where_it_does_not_mean_none() {
    zero_is_refused_except_in::<endio_block_store::Config>(&[
        "server.worker_threads",
        // None goes around the page cache.
        "direct_write_bytes_min",
        // Nothing is kept back of a lease.
        "lease_margin_ms",
    ]);
}

#[test]
fn a_writeback_refuses_zero_where_it_does_not_mean_none() {
    zero_is_refused_except_in::<endio_writeback::Config>(&[
        "server.worker_threads",
        // Write-out begins at once.
        "dirty_bytes_soft",
        // Nobody is delayed before the limit.
        "dirty_delay_max_ms",
        "flush_log_bytes",
        "write_around_bytes",
        // No credit is asked for ahead.
        "credit_low_blocks",
        "map_entries_per_volume",
        "read_cache_bytes",
        "defragment_bytes_per_s",
        "defragment_after_ms",
    ]);
}
