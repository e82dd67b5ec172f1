//! Commands that only ask: extents, io-ends, stores, check.

use endio_api::{
    common::Extent,
    conversion::{ListIoEndsRequest, ListStoresRequest},
    writeback::{CheckRequest, CheckResponse, ExtentsRequest, VolumeRequest},
};
use endio_chassis::{net::ListenAddr, shutdown::Shutdown, tls::Security};
use serde_json::{Value, json};

use crate::{
    args::{CheckArgs, ExtentsArgs},
    client::Client,
    failure::{Exit, Failure, Outcome},
    output::{
        Output, extent_json, extent_table, io_end_json, io_end_table, store_json, store_table,
    },
    up,
};

/// `endio extents`: prints each batch as it comes, so that a large map needs no memory.
pub(crate) async fn extents(client: &Client, out: Output, args: ExtentsArgs) -> Outcome {
    let what = format!("show the extents of volume {}", args.volume);
    let request = ExtentsRequest {
        volume: args.volume,
        offset_bytes: args.offset.bytes(),
        length_bytes: args.length.map_or(0, |length| length.bytes()),
    };
    let answer = client.inspect().extents(request).await;
    let mut batches = answer.map_err(|e| client.failure(&what, &e))?.into_inner();
    let print = |rows: &[Extent]| {
        let value = json!({ "extents": rows.iter().map(extent_json).collect::<Vec<_>>() });
        out.print(&value, || extent_table(rows))
    };
    let mut rows: Vec<Extent> = Vec::new();
    while let Some(batch) = batches.message().await.map_err(|e| client.failure(&what, &e))? {
        for extent in batch.extents {
            join(&mut rows, extent);
        }
        if rows.len() > EXTENT_ROWS_MAX {
            // The last row may go on in the next batch.
            let last = rows.split_off(rows.len() - 1);
            print(&rows)?;
            rows = last;
        }
    }
    print(&rows)
}

/// Rows printed at once: bounds the memory for a large map.
const EXTENT_ROWS_MAX: usize = 4_096;

/// Appends an extent, as a part of the last row if it continues that one: the map is cut at chunks
/// and at batches, which is nobody's concern here.
fn join(rows: &mut Vec<Extent>, next: Extent) {
    if let Some(last) = rows.last_mut()
        && continues(last, &next)
        && let Some(blocks) = last.blocks.checked_add(next.blocks)
    {
        last.blocks = blocks;
        last.crc32c.extend(next.crc32c);
        return;
    }
    rows.push(next);
}

fn continues(last: &Extent, next: &Extent) -> bool {
    let blocks = u64::from(last.blocks);
    last.state == next.state
        && last.lblk + blocks == next.lblk
        && last.places.len() == next.places.len()
        && last.places.iter().zip(&next.places).all(|(last, next)| {
            last.store == next.store && last.pblk.checked_add(blocks) == Some(next.pblk)
        })
}

/// `endio io-ends`
pub(crate) async fn io_ends(
    client: &Client,
    out: Output,
    volume: Option<String>,
    limit: u32,
) -> Outcome {
    let mut request = ListIoEndsRequest { volume: 0, limit };
    if let Some(name) = volume {
        let what = format!("show volume {name}");
        let answer = client.volumes().get(VolumeRequest { name }).await;
        request.volume = answer.map_err(|e| client.failure(what, &e))?.into_inner().id;
    }
    let answer = client.inspect().io_ends(request).await;
    let answer = answer.map_err(|e| client.failure("list io_ends", &e))?.into_inner();
    let list: Vec<Value> = answer.io_ends.iter().map(io_end_json).collect();
    out.print(&json!({ "io_ends": list, "total": answer.total }), || {
        io_end_table(&answer.io_ends, answer.total)
    })
}

/// `endio stores`
pub(crate) async fn stores(client: &Client, out: Output) -> Outcome {
    let answer = client.inspect().stores(ListStoresRequest {}).await;
    let stores = answer.map_err(|e| client.failure("list block-stores", &e))?.into_inner().stores;
    let list: Vec<Value> = stores.iter().map(store_json).collect();
    out.print(&json!({ "stores": list }), || store_table(&stores))
}

/// `endio check`
pub(crate) async fn check(client: &Client, out: Output, args: CheckArgs) -> Outcome {
    let Some(data_dir) = args.data_dir.clone() else {
        return check_running(client, out, args).await;
    };
    if !data_dir.join("conversion").is_dir() {
        let what = format!("check {}", data_dir.display());
        return Err(Failure::new(Exit::NotFound, what, "no data of `endio up` is there"));
    }
    let listen = ListenAddr::loopback();
    let plan = up::Plan {
        data_dir,
        listen,
        nbd_listen: None,
        nbd_tls: None,
        nbd_insecure_any_address: false,
        clients: std::collections::BTreeMap::new(),
        security: Security::Insecure { is_any_address: false },
        stores: 0,
        capacity_bytes: None,
    };
    let stack = up::start(&plan, Shutdown::new()).await.map_err(|failure| {
        failure.help("if another process has the data, check it there, without --data-dir")
    })?;
    let checked = match stack.ready().await {
        Ok(()) => match Client::new(&stack.grpc) {
            Ok(client) => check_running(&client, out, args).await,
            Err(failure) => Err(failure),
        },
        Err(failure) => Err(failure),
    };
    let stopped = stack.stop().await;
    checked.and(stopped)
}

async fn check_running(client: &Client, out: Output, args: CheckArgs) -> Outcome {
    let request = CheckRequest { read_data: args.read_data || !args.no_data };
    let answer = client.inspect().check(request).await;
    let answer = answer.map_err(|e| client.failure("check", &e))?.into_inner();
    out.print(&check_json(&answer), || check_text(&answer))?;
    verdict(findings(&answer).count())
}

/// Turns the number of findings into the command's outcome.
pub(crate) fn verdict(findings: usize) -> Outcome {
    if findings == 0 {
        return Ok(());
    }
    let message = format!("{findings} findings, listed above");
    Err(Failure::new(Exit::CheckFound, "call this clean", message))
}

fn findings(answer: &CheckResponse) -> impl Iterator<Item = &String> {
    answer.metadata.iter().flat_map(|metadata| &metadata.findings).chain(&answer.findings)
}

fn check_json(answer: &CheckResponse) -> Value {
    let metadata = answer.metadata.clone().unwrap_or_default();
    json!({
        "clean": findings(answer).next().is_none(),
        // Whether nothing was left out, as far as this check goes.
        "complete": answer.volumes_not_read == 0,
        "volumes_not_read": answer.volumes_not_read,
        "volumes_elsewhere": answer.volumes_elsewhere,
        "findings": findings(answer).collect::<Vec<_>>(),
        "volumes": metadata.volumes, "extents": metadata.extents,
        "mapped_blocks": metadata.mapped_blocks, "reserved_blocks": metadata.reserved_blocks,
        "quarantined_blocks": metadata.quarantined_blocks, "free_blocks": metadata.free_blocks,
        "io_ends": metadata.io_ends, "blocks_verified": answer.blocks_verified,
        "blocks_unreachable": answer.blocks_unreachable,
    })
}

fn check_text(answer: &CheckResponse) -> String {
    let metadata = answer.metadata.clone().unwrap_or_default();
    let mut text = format!(
        "{} volumes, {} extents, {} io_ends in flight\n\
         blocks: {} mapped, {} reserved, {} quarantined, {} free\n\
         data: {} blocks compared with their checksums, {} out of reach\n",
        metadata.volumes,
        metadata.extents,
        metadata.io_ends,
        metadata.mapped_blocks,
        metadata.reserved_blocks,
        metadata.quarantined_blocks,
        metadata.free_blocks,
        answer.blocks_verified,
        answer.blocks_unreachable,
    );
    for finding in findings(answer) {
        text.push_str(&format!("FOUND: {finding}\n"));
    }
    if answer.volumes_not_read > 0 {
        let mut names = answer.volumes_elsewhere.join(", ");
        if answer.volumes_not_read > answer.volumes_elsewhere.len() as u64 {
            names.push_str(", …");
        }
        text.push_str(&format!(
            "NOT READ: {} volumes are open at another writeback, check them there: {names}\n",
            answer.volumes_not_read
        ));
    }
    if findings(answer).next().is_none() {
        text.push_str(match answer.volumes_not_read {
            0 => "clean\n",
            _ => "clean, but for what was not read\n",
        });
    }
    text
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn findings_of_metadata_and_of_data_both_make_a_check_fail() {
        let metadata = endio_api::conversion::CheckResponse {
            findings: vec!["block 7 is mapped twice".into()],
            ..Default::default()
        };
        let answer = CheckResponse {
            metadata: Some(metadata),
            findings: vec!["block 9 has a bad checksum".into()],
            ..CheckResponse::default()
        };
        let text = check_text(&answer);
        assert!(text.contains("FOUND: block 7 is mapped twice"), "{text}");
        assert!(text.contains("FOUND: block 9 has a bad checksum"), "{text}");
        assert_eq!(check_json(&answer)["clean"], false);
        assert_eq!(verdict(findings(&answer).count()).unwrap_err().exit, Exit::CheckFound);
        assert!(check_text(&CheckResponse::default()).ends_with("\nclean\n"));
    }

    #[test]
    fn what_was_not_read_is_no_finding_and_is_told_all_the_same() {
        let answer = CheckResponse {
            volumes_elsewhere: vec!["a".into(), "b".into()],
            volumes_not_read: 3,
            ..CheckResponse::default()
        };
        let text = check_text(&answer);
        assert!(text.contains("NOT READ: 3 volumes"), "{text}");
        assert!(
            text.contains("a, b, …") && text.ends_with("but for what was not read\n"),
            "{text}"
        );
        let value = check_json(&answer);
        assert_eq!((&value["clean"], &value["complete"]), (&json!(true), &json!(false)));
        assert!(verdict(findings(&answer).count()).is_ok());
        assert_eq!(check_json(&CheckResponse::default())["complete"], true);
    }
}

#[cfg(test)]
mod joining {
    use super::*;
    use endio_api::common::{ExtentState, Place};

    fn hole(lblk: u64, blocks: u32) -> Extent {
        Extent { lblk, blocks, state: ExtentState::Hole.into(), ..Extent::default() }
    }

    fn written(lblk: u64, blocks: u32, pblk: u64) -> Extent {
        let places = vec![Place { store: 1, pblk }];
        let crc32c = vec![7; blocks as usize];
        Extent { lblk, blocks, state: ExtentState::Written.into(), places, crc32c }
    }

    #[test]
    fn holes_and_pieces_that_go_on_elsewhere_are_one_row() {
        let mut rows = Vec::new();
        for extent in [hole(0, 10), hole(10, 5), written(15, 2, 100), written(17, 3, 102)] {
            join(&mut rows, extent);
        }
        assert_eq!(rows, [hole(0, 15), written(15, 5, 100)]);
    }

    #[test]
    fn pieces_that_lie_apart_stay_two_rows() {
        let mut rows = Vec::new();
        for extent in [written(0, 2, 100), written(2, 2, 103), hole(4, 1), hole(6, 1)] {
            join(&mut rows, extent);
        }
        assert_eq!(rows.len(), 4);
    }
}
