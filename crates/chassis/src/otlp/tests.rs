#![allow(clippy::unwrap_used)]

use super::*;
use crate::trace::Sampler;

fn read(variables: &[(&str, &str)]) -> Result<Settings, String> {
    let variables: Vec<(String, String)> =
        variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Settings::read("endio-test", &move |name| {
        variables.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone())
    })
}

const HERE: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317/");

#[test]
fn nothing_is_exported_without_an_endpoint() {
    assert!(!read(&[]).unwrap().is_any_on());
    assert!(!read(&[("OTEL_TRACES_EXPORTER", "otlp")]).unwrap().is_any_on());
}

#[test]
fn one_endpoint_turns_all_signals_on_and_each_can_be_turned_off() {
    let all = [Signal::Traces, Signal::Metrics, Signal::Logs];
    let settings = read(&[HERE]).unwrap();
    assert!(all.into_iter().all(|signal| settings.is_on(signal)));
    let settings = read(&[HERE, ("OTEL_LOGS_EXPORTER", "none")]).unwrap();
    assert!(settings.is_on(Signal::Traces) && !settings.is_on(Signal::Logs));
    assert!(!read(&[HERE, ("OTEL_SDK_DISABLED", "true")]).unwrap().is_any_on());
    let own = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:4317");
    let settings = read(&[own]).unwrap();
    assert!(settings.is_on(Signal::Traces) && !settings.is_on(Signal::Metrics));
}

#[test]
fn metrics_find_their_path_by_protocol() {
    assert_eq!(read(&[HERE]).unwrap().endpoint, "http://127.0.0.1:4317/v1/metrics");
    let grpc = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
    assert_eq!(read(&[HERE, grpc]).unwrap().endpoint, "http://127.0.0.1:4317/");
    assert!(read(&[HERE, ("OTEL_EXPORTER_OTLP_PROTOCOL", "pigeon")]).is_err());
}

#[test]
fn samplers_have_the_names_of_the_specification() {
    let sampler = |name: &str, arg: &str| {
        let read = read(&[("OTEL_TRACES_SAMPLER", name), ("OTEL_TRACES_SAMPLER_ARG", arg)]);
        read.map(|settings| settings.sampler.unwrap())
    };
    assert_eq!(sampler("always_on", "0"), Ok(Sampler::Ratio(1.0)));
    assert_eq!(sampler("always_off", "1"), Ok(Sampler::Ratio(0.0)));
    assert_eq!(sampler("traceidratio", "0.25"), Ok(Sampler::Ratio(0.25)));
    let parent = sampler("parentbased_traceidratio", "0.5");
    assert_eq!(parent, Ok(Sampler::ParentOrRatio(0.5)));
    assert!(sampler("parentbased_traceidratio", "1.5").is_err());
    assert!(sampler("jaeger_remote", "1").is_err());
}

#[test]
fn the_name_of_the_service_comes_from_its_variable_then_from_attributes() {
    let name = |variables: &[(&str, &str)]| {
        let resource = read(variables).unwrap().resource;
        resource.get(&"service.name".into()).unwrap().to_string()
    };
    let attributes = ("OTEL_RESOURCE_ATTRIBUTES", "service.name=a, zone=z");
    assert_eq!(name(&[]), "endio-test");
    assert_eq!(name(&[attributes]), "a");
    assert_eq!(name(&[attributes, ("OTEL_SERVICE_NAME", "b")]), "b");
}

#[test]
fn a_number_that_is_none_is_told_with_its_name() {
    let error = read(&[("OTEL_BSP_MAX_QUEUE_SIZE", "many")]).unwrap_err();
    assert!(error.contains("OTEL_BSP_MAX_QUEUE_SIZE"), "{error}");
    let settings = read(&[("OTEL_BSP_MAX_QUEUE_SIZE", "64")]).unwrap();
    assert_eq!((settings.spans.queue_max, settings.spans.batch_max), (64, 64));
}

#[tokio::test(start_paused = true)]
async fn a_collector_that_never_answers_costs_what_was_queued_and_nothing_else() {
    static COUNTS: Counts = Counts::new();
    let (to, queue) = mpsc::channel(4);
    let (ask, asked) = mpsc::channel(1);
    let second = Duration::from_secs(1);
    let limits = Batching { queue_max: 4, batch_max: 4, delay: second, timeout: second };
    let export = |_: Vec<u32>| std::future::pending();
    tokio::spawn(run(queue, asked, limits, &COUNTS, "numbers", export));
    for number in 0..4 {
        to.try_send(number).unwrap();
    }
    assert!(to.try_send(4).is_err(), "the queue is bounded");
    let (done, is_done) = oneshot::channel();
    ask.send(done).await.unwrap();
    is_done.await.unwrap();
    assert_eq!(COUNTS.dropped.load(Ordering::Relaxed), 4);
    assert_eq!(COUNTS.failed_exports.load(Ordering::Relaxed), 1);
}
