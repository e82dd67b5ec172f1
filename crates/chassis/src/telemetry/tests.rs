#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn a_filter_that_cannot_be_read_is_refused() {
    let config = TelemetryConfig { log_filter: "a=b=c".to_owned(), ..Default::default() };
    assert!(matches!(log_filter(&config), Err(TelemetryError::Filter { .. })));
}

#[test]
fn metadata_names_the_parent_or_nobody() {
    let mut metadata = MetadataMap::new();
    assert_eq!(remote_parent(&metadata), "");
    metadata.insert("traceparent", "00-ab".parse().unwrap());
    assert_eq!(remote_parent(&metadata), "00-ab");
}

#[derive(Clone, Default)]
struct Lines(std::sync::Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn json_lines_name_the_trace_that_they_belong_to() {
    let _recorder = crate::trace::tests::recorder();
    let lines = Lines::default();
    let writer = lines.clone();
    let layer = tracing_subscriber::fmt::layer().with_writer(move || writer.clone());
    let subscriber = tracing_subscriber::registry().with(layer.event_format(lines::Json));
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let span = crate::trace::Tracer::new("writeback").entry("write", parent);
    let span_id = span.context().unwrap().span_id();
    let _default = tracing::subscriber::set_default(subscriber);
    span.scope(async { tracing::warn!(volume = "v", blocks = 3, "inside") }).await;
    tracing::warn!("outside");
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    let parsed: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(parsed[0]["fields"]["message"], "inside");
    assert_eq!(parsed[0]["fields"]["blocks"], 3);
    assert_eq!(parsed[0]["trace_id"], "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(parsed[0]["span_id"], span_id.as_str());
    assert_eq!(parsed[1].get("trace_id"), None);
}
