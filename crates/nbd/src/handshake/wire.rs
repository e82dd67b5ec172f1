//! Options and their replies as bytes ("Option types", "Option reply types").

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::codec::cut;
use crate::consts::{OPTION_REPLY_MAGIC, STRING_MAX, rep};
use crate::export::OpenError;

/// A reply to an option.
pub(super) fn reply(option: u32, kind: u32, data: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(20 + data.len());
    out.put_u64(OPTION_REPLY_MAGIC);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(data.len() as u32);
    out.put_slice(data);
    out.freeze()
}

pub(super) fn refusal(option: u32, kind: u32, why: &str) -> Bytes {
    reply(option, kind, cut(why, STRING_MAX).as_bytes())
}

pub(super) fn open_refusal(option: u32, error: &OpenError) -> Bytes {
    let kind = match error {
        OpenError::Unknown => rep::ERR_UNKNOWN,
        OpenError::Denied(_) => rep::ERR_POLICY,
        OpenError::Unavailable(_) => rep::ERR_SHUTDOWN,
    };
    refusal(option, kind, &error.to_string())
}

pub(super) fn is_text(text: &str) -> bool {
    text.len() <= STRING_MAX && !text.contains('\0')
}

/// A string by the rules of "Conventions".
pub(super) fn text(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?;
    is_text(text).then(|| text.to_owned())
}

/// A string behind its 32-bit length.
pub(super) fn counted_text(data: &mut Bytes) -> Option<String> {
    let length = data.try_get_u32().ok()? as usize;
    if data.len() < length {
        return None;
    }
    text(&data.split_to(length))
}

/// "NBD_OPT_INFO and NBD_OPT_GO": name, number of kinds, kinds.
pub(super) fn info_request(mut data: Bytes) -> Option<(String, Vec<u16>)> {
    let name = counted_text(&mut data)?;
    let count = usize::from(data.try_get_u16().ok()?);
    if data.len() != 2 * count {
        return None;
    }
    let wants = data.chunks_exact(2).map(|mut kind| kind.get_u16()).collect();
    Some((name, wants))
}

/// "NBD_OPT_LIST_META_CONTEXT": export name, number of queries, queries.
pub(super) fn context_request(mut data: Bytes) -> Option<(String, Vec<String>)> {
    let name = counted_text(&mut data)?;
    let count = data.try_get_u32().ok()? as usize;
    // Each query takes at least the four bytes of its length, so this bounds the allocation.
    if count > data.len() / 4 {
        return None;
    }
    let mut queries = Vec::with_capacity(count);
    for _ in 0..count {
        let query = counted_text(&mut data)?;
        // A query is `namespace:leaf`, `namespace:`; the namespace is not empty.
        if query.find(':').is_none_or(|colon| colon == 0) {
            return None;
        }
        queries.push(query);
    }
    data.is_empty().then_some((name, queries))
}
