//! Who has no valid certificate of the authority gets nothing, not even health, from any service.

use std::path::Path;
use std::time::Duration;

use endio_api::access::Role;
use endio_chassis::net::Dialer;
use endio_chassis::tls::Tls;
use endio_integration_tests::secured::{Authority, Secured, call_empty};
use tonic::Status;

const HEALTH: &str = "grpc.health.v1.Health/Check";
const LONG: Duration = Duration::from_secs(60);

/// Asks for health on a connection of its own.
async fn ask(certificate: &Path, url: &str) -> Result<(), Status> {
    let dialer = Dialer::default().secured(Tls::load(certificate).unwrap());
    call_empty(&dialer.channel(url).unwrap(), HEALTH).await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_valid_certificate_gets_nothing_from_any_service() {
    let secured = Secured::start(|_| {}).await;
    let other = Authority::default();
    let stranger = other.certificate(Role::Admin, "me");
    // It believes the services, and they do not believe it.
    let authorities = secured.authority.directory().join("ca.pem");
    std::fs::copy(authorities, stranger.join("ca.pem")).unwrap();
    let ended = secured.authority.ended(Role::Admin, "late");
    let valid = secured.authority.certificate(Role::Admin, "me");
    for service in [Role::Conversion, Role::BlockStore, Role::Writeback] {
        let url = secured.url(service);
        let plain = Dialer::default().channel(&url.replace("https://", "http://")).unwrap();
        call_empty(&plain, HEALTH).await.unwrap_err();
        ask(&stranger, url).await.unwrap_err();
        let refused = async { while ask(&ended, url).await.is_ok() {} };
        tokio::time::timeout(LONG, refused).await.unwrap();
        ask(&valid, url).await.unwrap();
    }
    secured.stop().await;
}
