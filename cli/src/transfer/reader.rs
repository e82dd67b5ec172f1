//! Reading ranges of a volume of any length, across broken connections.

use std::{io, time::Duration};

use bytes::Bytes;
use endio_api::writeback::{ReadRequest, ReadResponse};
use tonic::Status;

use super::patience::{Action, Patience, action};
use crate::{
    client::Client,
    failure::{Exit, Failure, Outcome},
};

/// Some bytes at an offset.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Piece {
    /// These bytes.
    Data(u64, Bytes),
    /// So many zeroes.
    Zeroes(u64, u64),
}

/// Reads a range in order into `sink`. After a broken connection it goes on where it was.
///
/// # Errors
/// The volume refuses for good, the service misbehaves, the sink fails, or patience is exhausted.
pub(crate) async fn read_range(
    client: &Client,
    volume: &str,
    offset: u64,
    length: u64,
    patience: Duration,
    mut sink: impl FnMut(Piece) -> io::Result<()>,
) -> Outcome {
    let what = format!("read {length} bytes at {offset} of volume {volume}");
    let end = offset
        .checked_add(length)
        .ok_or_else(|| Failure::new(Exit::Usage, what.as_str(), "the range ends beyond 64 bits"))?;
    let mut patience = Patience::new(patience);
    let mut at = offset;
    while at < end {
        let request = ReadRequest {
            volume: volume.into(),
            offset_bytes: at,
            length_bytes: end - at,
            traceparent: String::new(),
        };
        let status = match client.io().read(request).await {
            Err(status) => status,
            Ok(answer) => {
                let mut pieces = answer.into_inner();
                loop {
                    match pieces.message().await {
                        Ok(Some(answer)) => {
                            let (piece, length) = accept(answer, at, end - at)
                                .map_err(|why| Failure::new(Exit::Failed, what.as_str(), why))?;
                            sink(piece).map_err(|error| {
                                Failure::new(Exit::Failed, "write what was read", error)
                            })?;
                            at += length;
                            patience.progress();
                        }
                        Ok(None) => break Status::unavailable("the answer ended early"),
                        Err(status) => break status,
                    }
                }
            }
        };
        if at < end {
            let failure = client.failure(what.as_str(), &status);
            if action(endio_api::status::reason(&status)) == Action::Stop {
                return Err(failure);
            }
            patience.wait(&failure, endio_api::status::retry_after(&status)).await?;
        }
    }
    Ok(())
}

/// Checks that an answer continues where the last one ended.
fn accept(answer: ReadResponse, at: u64, left: u64) -> Result<(Piece, u64), &'static str> {
    let length =
        if answer.data.is_empty() { answer.zeroes_bytes } else { answer.data.len() as u64 };
    if answer.offset_bytes != at {
        return Err("the service answered with bytes of another place");
    }
    if length == 0 || length > left {
        return Err("the service answered with more or less than was asked for");
    }
    if answer.data.is_empty() {
        return Ok((Piece::Zeroes(at, length), length));
    }
    if answer.zeroes_bytes != 0 {
        return Err("the service answered with data and zeroes at once");
    }
    Ok((Piece::Data(at, answer.data), length))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(offset_bytes: u64, data: &'static [u8], zeroes_bytes: u64) -> ReadResponse {
        ReadResponse { offset_bytes, data: Bytes::from_static(data), zeroes_bytes }
    }

    #[test]
    fn only_answers_that_continue_in_order_are_accepted() {
        let zeroes = accept(answer(8, b"", 4), 8, 4);
        assert_eq!(zeroes, Ok((Piece::Zeroes(8, 4), 4)));
        let data = accept(answer(8, b"ab", 0), 8, 4);
        assert_eq!(data, Ok((Piece::Data(8, Bytes::from_static(b"ab")), 2)));
        assert!(accept(answer(9, b"ab", 0), 8, 4).is_err());
        assert!(accept(answer(8, b"abcde", 0), 8, 4).is_err());
        assert!(accept(answer(8, b"", 0), 8, 4).is_err());
        assert!(accept(answer(8, b"", 5), 8, 4).is_err());
        assert!(accept(answer(8, b"ab", 2), 8, 4).is_err());
    }
}
