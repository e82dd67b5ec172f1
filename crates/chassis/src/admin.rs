//! A small HTTP server for scrapers and probes: `/metrics`, `/healthz`, `/readyz`.
//!
//! It tells numbers and takes nothing; all the same it belongs on loopback or a private network.

use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};

use axum::Router;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tower::ServiceBuilder;
use tower::limit::GlobalConcurrencyLimitLayer;

use crate::metrics::{self, Form};
use crate::server::Readiness;

/// Requests answered at once; more wait. A scrape is some 100 KB of text.
const REQUESTS_MAX: usize = 16;

static READY: Mutex<Vec<(&'static str, Readiness)>> = Mutex::new(Vec::new());

/// `/readyz` speaks for this service, too; a later one of the same name replaces it.
pub fn watch(service: &'static str, readiness: &Readiness) {
    let mut all = READY.lock().unwrap_or_else(PoisonError::into_inner);
    all.push((service, readiness.clone()));
    // Tests start many services in one process.
    if all.len() > 256 {
        all.remove(0);
    }
}

/// Services that take no work now, by name; `None`: no service was started yet.
pub(crate) fn not_ready() -> Option<Vec<&'static str>> {
    let all = READY.lock().unwrap_or_else(PoisonError::into_inner);
    let waiting = all.iter().filter(|(_, readiness)| !readiness.is_ready());
    let waiting = waiting.map(|(service, _)| *service).collect();
    (!all.is_empty()).then_some(waiting)
}

/// Serves if there is an address; returns the url to tell.
///
/// # Errors
/// As [`serve`].
pub async fn serve_if(address: Option<&str>) -> std::io::Result<Option<String>> {
    match address {
        Some(address) => Ok(Some(format!("http://{}/metrics", serve(address).await?))),
        None => Ok(None),
    }
}

/// Serves in the background until the process ends. Returns where; port 0 chooses one.
///
/// # Errors
/// The address cannot be bound.
pub async fn serve(address: &str) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind(address).await?;
    let bound = listener.local_addr()?;
    if !bound.ip().is_loopback() {
        tracing::warn!(%bound, "metrics are shown to everybody who can reach this address");
    }
    let limits = ServiceBuilder::new().layer(GlobalConcurrencyLimitLayer::new(REQUESTS_MAX));
    let routes = Router::new()
        .route("/metrics", get(show_metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(show_readiness))
        .layer(limits);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, routes).await {
            tracing::error!(%error, "the metrics listener failed");
        }
    });
    Ok(bound)
}

async fn show_metrics(headers: HeaderMap) -> impl IntoResponse {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or("");
    let form = Form::accepted(accept);
    ([(header::CONTENT_TYPE, form.content_type())], metrics::render(form))
}

async fn show_readiness() -> (StatusCode, String) {
    match not_ready() {
        Some(waiting) if waiting.is_empty() => (StatusCode::OK, "ready\n".to_owned()),
        Some(waiting) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {}\n", waiting.join(", ")))
        }
        None => (StatusCode::SERVICE_UNAVAILABLE, "starting\n".to_owned()),
    }
}
