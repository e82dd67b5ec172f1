#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn ready_is_one_line_of_json_whose_fixed_fields_cannot_be_replaced() {
    let extra = [("store", Value::from(3)), ("service", Value::from("x\ny"))];
    let line = ready_line("app", "http://127.0.0.1:1", &extra);
    assert_eq!(line.matches('\n').count(), 1);
    assert!(line.ends_with('\n'));
    let value: Value = serde_json::from_str(&line).unwrap();
    let expected = serde_json::json!({
        "event": "ready", "service": "app", "grpc": "http://127.0.0.1:1", "store": 3,
    });
    assert_eq!(value, expected);
}
