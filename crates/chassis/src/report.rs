//! What a process tells whoever started it: one JSON line on stdout.

use std::io::{self, Write};

use serde_json::{Map, Value};

/// Prints `{"event":"ready","service":…,"grpc":…, …extra}` as one line on stdout and flushes it.
///
/// `extra` adds fields; the three fixed ones cannot be replaced.
///
/// # Errors
/// stdout cannot be written.
pub fn ready(service: &str, grpc_url: &str, extra: &[(&str, Value)]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(ready_line(service, grpc_url, extra).as_bytes())?;
    out.flush()
}

fn ready_line(service: &str, grpc_url: &str, extra: &[(&str, Value)]) -> String {
    let mut fields = Map::new();
    for (name, value) in extra {
        fields.insert((*name).to_owned(), value.clone());
    }
    fields.insert("event".to_owned(), Value::from("ready"));
    fields.insert("service".to_owned(), Value::from(service));
    fields.insert("grpc".to_owned(), Value::from(grpc_url));
    format!("{}\n", Value::Object(fields))
}

#[cfg(test)]
mod tests;
