//! `endio status`: one screen about everything.

use endio_api::{
    conversion::Volume,
    writeback::{Blocked, StatusRequest, StatusResponse, StoreStatus, VolumeStatus},
};
use endio_types::{BLOCK_BYTES, Reason};
use serde_json::{Value, json};

use crate::{
    client::Client,
    failure::Outcome,
    output::{Output, Table, human},
};

/// `endio status`
pub(crate) async fn run(client: &Client, out: Output) -> Outcome {
    let status = ask(client).await?;
    out.print(&status_json(&status), || status_text(&status))
}

/// Asks for everything.
pub(crate) async fn ask(client: &Client) -> Outcome<StatusResponse> {
    let answer = client.inspect().status(StatusRequest { cluster: true }).await;
    Ok(answer.map_err(|e| client.failure("show the status", &e))?.into_inner())
}

fn reason(blocked: &Blocked) -> &'static str {
    Reason::from_wire(blocked.reason).map_or("", Reason::name)
}

/// Its status here, if it is open here.
fn open_here<'a>(status: &'a StatusResponse, name: &str) -> Option<&'a VolumeStatus> {
    status.volumes.iter().find(|volume| volume.name == name)
}

/// Everything, for programs.
pub(crate) fn status_json(status: &StatusResponse) -> Value {
    let volumes: Vec<Value> = status
        .volumes
        .iter()
        .map(|volume| {
            json!({
                "name": volume.name, "generation": volume.generation,
                "dirty_bytes": volume.dirty_bytes, "in_flight_bytes": volume.in_flight_bytes,
                "error_pending": volume.error_pending, "lost_writes": volume.lost_writes,
                "blocked": volume.blocked,
                "writes": volume.writes, "written_bytes": volume.written_bytes,
                "write_us": volume.write_us, "reads": volume.reads,
                "read_bytes": volume.read_bytes, "read_us": volume.read_us,
            })
        })
        .collect();
    let all: Vec<Value> = status.all_volumes.iter().map(crate::output::volume_json).collect();
    let stores: Vec<Value> = status.stores.iter().map(store_json).collect();
    let blocked = status.blocked.iter().map(|blocked| {
        json!({ "what": blocked.what, "reason": reason(blocked), "message": blocked.message })
    });
    let conversion = status.conversion.as_ref().map(|conversion| {
        json!({
            "version": conversion.version, "cluster_epoch": conversion.cluster_epoch,
            "uptime_ms": conversion.uptime_ms, "io_ends": conversion.io_ends,
            "queued_write_out": conversion.queued_write_out,
            "queued_direct": conversion.queued_direct,
            "metadata_full": conversion.metadata_full, "draining": conversion.draining,
            "durable_record": conversion.durable_record,
            "journal_bytes": conversion.journal_bytes,
            "checkpoint_bytes": conversion.checkpoint_bytes,
        })
    });
    json!({
        "writeback": status.writeback, "insecure": status.insecure, "version": status.version, "uptime_ms": status.uptime_ms,
        "cluster_epoch": status.cluster_epoch, "connected": status.connected,
        "dirty_bytes": status.dirty_bytes, "dirty_bytes_max": status.dirty_bytes_max,
        "log_bytes": status.log_bytes, "volumes": volumes, "conversion": conversion,
        "all_volumes": all, "volumes_unknown": status.volumes_unknown, "stores": stores, "blocked": blocked.collect::<Vec<_>>(),
    })
}

fn store_json(status: &StoreStatus) -> Value {
    let mut value = crate::output::store_json(&status.store.clone().unwrap_or_default());
    let answer = status.answer.as_ref().map(|answer| {
        json!({
            "version": answer.version, "uptime_ms": answer.uptime_ms,
            "cluster_epoch": answer.cluster_epoch, "used_blocks": answer.used_blocks,
            "in_flight": answer.in_flight, "refused": answer.refused,
            "segments": answer.segments, "written_blocks": answer.written_blocks,
            "write_us": answer.write_us, "reads": answer.reads,
            "read_blocks": answer.read_blocks, "read_us": answer.read_us,
        })
    });
    if let Value::Object(fields) = &mut value {
        fields.insert("answer".to_owned(), answer.unwrap_or(Value::Null));
    }
    value
}

/// How long something runs: "3d 4h", "2h 5m", "3m 20s", "12s".
fn duration(ms: u64) -> String {
    let s = ms / 1_000;
    match s {
        0..60 => format!("{s}s"),
        60..3_600 => format!("{}m {}s", s / 60, s % 60),
        3_600..86_400 => format!("{}h {}m", s / 3_600, s / 60 % 60),
        _ => format!("{}d {}h", s / 86_400, s / 3_600 % 24),
    }
}

/// One screen for people: services, volumes, stores, what is blocked.
pub(crate) fn status_text(status: &StatusResponse) -> String {
    let mut text = services(status);
    if !status.all_volumes.is_empty() {
        text.push('\n');
        text.push_str(&volumes(status));
    } else if has_no_list(status) && !status.volumes.is_empty() {
        text.push('\n');
        text.push_str(&volumes_here(status));
    }
    if !status.volumes_unknown.is_empty() {
        text.push_str(&format!("volumes NOT LISTED: {}\n", status.volumes_unknown));
    }
    if let Some(conversion) = &status.conversion {
        text.push_str(&format!(
            "\nio_ends {} in flight; waiting for conversion: {} buffered, {} direct\n",
            conversion.io_ends, conversion.queued_write_out, conversion.queued_direct
        ));
    }
    text.push_str(&format!(
        "dirty {} of at most {}; cache log {}\n",
        human(status.dirty_bytes),
        human(status.dirty_bytes_max),
        human(status.log_bytes)
    ));
    if status.insecure {
        text.push_str("NOT SECURED: no TLS; whoever reaches the gRPC port may do everything\n");
    }
    if status.blocked.is_empty() {
        text.push_str("nothing is blocked\n");
    }
    for blocked in &status.blocked {
        let reason = reason(blocked);
        text.push_str(&format!("BLOCKED {}: {reason}: {}\n", blocked.what, blocked.message));
    }
    text
}

/// Whether it is not known which volumes there are: not, as otherwise, that there are none.
fn has_no_list(status: &StatusResponse) -> bool {
    status.conversion.is_none() || !status.volumes_unknown.is_empty()
}

fn services(status: &StatusResponse) -> String {
    let heads = ["SERVICE", "VERSION", "EPOCH", "UP", "STATE", "FREE", "SIZE", "QUARANTINED"];
    let mut table = Table::new(&heads);
    let row = |name: String, version: &str, epoch: u64, uptime_ms: Option<u64>, state: String| {
        let version = if version.is_empty() { "-" } else { version };
        let up = uptime_ms.map_or("-".into(), duration);
        vec![name, version.to_owned(), epoch.to_string(), up, state]
    };
    let connected = if status.connected { "connected" } else { "NOT connected" };
    let (version, epoch) = (&status.version, status.cluster_epoch);
    let up = Some(status.uptime_ms);
    table.row(row(status.writeback.clone(), version, epoch, up, connected.into()));
    match &status.conversion {
        Some(it) => {
            let state = match (it.draining, it.metadata_full) {
                (true, _) => "stopping",
                (_, true) => "METADATA FULL",
                _ => "serving",
            };
            let up = Some(it.uptime_ms);
            table.row(row("conversion".into(), &it.version, it.cluster_epoch, up, state.into()));
        }
        None => table.row(row("conversion".into(), "", 0, None, "AWAY".into())),
    }
    for StoreStatus { store, answer } in &status.stores {
        let store = store.clone().unwrap_or_default();
        let (version, epoch, up) = answer.as_ref().map_or(("", 0, None), |answer| {
            (answer.version.as_str(), answer.cluster_epoch, Some(answer.uptime_ms))
        });
        let state = match store.live {
            true => format!("incarnation {}, lease {} ms", store.incarnation, store.lease_left_ms),
            false => format!("AWAY, incarnation {}", store.incarnation),
        };
        let mut cells = row(format!("store {}", store.id), version, epoch, up, state);
        cells.push(human(store.free_blocks * BLOCK_BYTES));
        cells.push(human(store.capacity_blocks * BLOCK_BYTES));
        cells.push(human(store.quarantined_blocks * BLOCK_BYTES));
        table.row(cells);
    }
    table.render()
}

fn volumes(status: &StatusResponse) -> String {
    let heads = ["VOLUME", "OWNER", "GENERATION", "SIZE", "COPIES", "MAPPED", "DIRTY", "IN FLIGHT"];
    let mut table = Table::new(&heads);
    for volume in &status.all_volumes {
        let here = open_here(status, &volume.name);
        let of_here =
            |value: fn(&VolumeStatus) -> u64| here.map_or("-".into(), |v| human(value(v)));
        table.row(vec![
            volume.name.clone(),
            owner(volume, &status.writeback),
            volume.generation.to_string(),
            human(volume.size_bytes),
            volume.replicas.to_string(),
            human(volume.mapped_blocks * BLOCK_BYTES),
            of_here(|volume| volume.dirty_bytes),
            of_here(|volume| volume.in_flight_bytes),
        ]);
    }
    table.render()
}

/// Whether an owner is that writeback. Conversion writes the name in its certificate behind it.
fn is_of(owner: &str, writeback: &str) -> bool {
    owner.strip_prefix(writeback).is_some_and(|rest| rest.is_empty() || rest.starts_with('@'))
}

/// What this writeback knows by itself, while conversion does not tell.
fn volumes_here(status: &StatusResponse) -> String {
    let mut table = Table::new(&["VOLUME", "OWNER", "GENERATION", "DIRTY", "IN FLIGHT"]);
    for volume in &status.volumes {
        table.row(vec![
            volume.name.clone(),
            "this writeback".to_owned(),
            volume.generation.to_string(),
            human(volume.dirty_bytes),
            human(volume.in_flight_bytes),
        ]);
    }
    table.render()
}

fn owner(volume: &Volume, here: &str) -> String {
    match volume.owner.as_str() {
        "" => "nobody".to_owned(),
        owner if is_of(owner, here) => "this writeback".to_owned(),
        owner => owner.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use endio_api::{blockstore, conversion};

    use super::*;

    fn status() -> StatusResponse {
        let store = conversion::Store { id: 3, incarnation: 9, free_blocks: 512, ..<_>::default() };
        StatusResponse {
            writeback: "wb-1/2".into(),
            version: "1.2.3".into(),
            uptime_ms: 125_000,
            insecure: true,
            cluster_epoch: 7,
            conversion: Some(conversion::DescribeResponse { io_ends: 42, ..<_>::default() }),
            all_volumes: vec![
                Volume { name: "here".into(), owner: "wb-1/2@w1".into(), ..<_>::default() },
                Volume { name: "there".into(), owner: "wb-1/20".into(), ..<_>::default() },
                Volume { name: "free".into(), ..<_>::default() },
            ],
            volumes: vec![VolumeStatus {
                name: "here".into(),
                dirty_bytes: 8192,
                ..<_>::default()
            }],
            stores: vec![StoreStatus { store: Some(store), answer: None }],
            blocked: vec![Blocked {
                reason: Reason::PeerAway as i32,
                what: "store 3".into(),
                message: "away".into(),
            }],
            ..StatusResponse::default()
        }
    }

    #[test]
    fn the_screen_names_services_volumes_owners_and_what_is_blocked() {
        let text = status_text(&status());
        for part in [
            "wb-1/2",
            "1.2.3",
            "2m 5s",
            "NOT connected",
            "store 3",
            "AWAY, incarnation 9",
            "this writeback",
            "wb-1/20",
            "nobody",
            "NOT SECURED",
            "8KiB",
            "io_ends 42 in flight",
            "BLOCKED store 3: PEER_AWAY: away",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
    }

    #[test]
    fn a_list_that_failed_is_told_from_one_without_volumes() {
        let empty = StatusResponse { all_volumes: Vec::new(), ..status() };
        assert!(!status_text(&empty).contains("NOT LISTED"));
        let failed = StatusResponse { volumes_unknown: "too large".into(), ..empty };
        let text = status_text(&failed);
        assert!(text.contains("volumes NOT LISTED: too large"), "{text}");
        assert!(text.contains("here") && text.contains("8KiB"), "{text}");
        assert_eq!(status_json(&failed)["volumes_unknown"], "too large");
    }

    #[test]
    fn json_has_null_for_who_does_not_answer() {
        let away = StatusResponse { conversion: None, ..status() };
        let value = status_json(&away);
        assert!(value["conversion"].is_null() && value["stores"][0]["answer"].is_null());
        let alone = status_text(&StatusResponse { all_volumes: Vec::new(), ..away });
        assert!(alone.contains("here") && alone.contains("8KiB"), "{alone}");
        let answer = Some(blockstore::DescribeResponse { in_flight: 5, ..<_>::default() });
        let heard = StatusResponse {
            stores: vec![StoreStatus { answer, ..status().stores.remove(0) }],
            ..status()
        };
        assert_eq!(status_json(&heard)["stores"][0]["answer"]["in_flight"], 5);
        assert_eq!(status_json(&heard)["blocked"][0]["reason"], "PEER_AWAY");
    }
}
