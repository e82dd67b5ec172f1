//! `endio health`: whether a service takes work, for probes and scripts.

use std::time::Duration;

use serde_json::json;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use crate::{
    client::Client,
    failure::{Exit, Failure, Outcome},
    output::Output,
};

/// Asks any of the three services, by `grpc.health.v1`. Succeeds only if it says SERVING.
pub(crate) async fn run(
    client: &Client,
    out: Output,
    service: String,
    patience: Duration,
) -> Outcome {
    let what = "tell that the service is healthy";
    let request = HealthCheckRequest { service: service.clone() };
    let mut health = HealthClient::new(client.channel());
    let answer = tokio::time::timeout(patience, health.check(request)).await;
    let answer = answer
        .map_err(|_| Failure::new(Exit::Unreachable, what, format!("no answer in {patience:?}")))?
        .map_err(|status| match status.code() {
            tonic::Code::NotFound => {
                Failure::new(Exit::NotFound, what, format!("it has no service {service:?}"))
            }
            _ => client.failure(what, &status),
        })?;
    verdict(answer.into_inner().status())?;
    out.print(&json!({ "status": "SERVING" }), || "SERVING".to_owned())
}

fn verdict(status: ServingStatus) -> Outcome {
    if status == ServingStatus::Serving {
        return Ok(());
    }
    let message = format!("it says {}", status.as_str_name());
    Err(Failure::new(Exit::Unreachable, "tell that the service is healthy", message)
        .help("it starts, stops, or waits for the conversion service; its log tells"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_serving_is_healthy() {
        assert!(verdict(ServingStatus::Serving).is_ok());
        for status in
            [ServingStatus::NotServing, ServingStatus::Unknown, ServingStatus::ServiceUnknown]
        {
            let failure = verdict(status).unwrap_err();
            assert_eq!(failure.exit, Exit::Unreachable, "{status:?}");
        }
    }
}
