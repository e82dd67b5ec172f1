//! The W3C context of a span, ids, and the clock of spans.

use std::cell::Cell;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Names a span of a trace, and whether the trace is sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Context {
    /// Never 0.
    pub trace: u128,
    /// Never 0.
    pub span: u64,
    /// Decided at the root of the trace.
    pub is_sampled: bool,
}

impl Context {
    /// Reads `00-<trace>-<span>-<flags>` (W3C Trace Context, section 3.2).
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = text.as_bytes();
        if bytes.len() < 55 || [2, 35, 52].iter().any(|at| bytes[*at] != b'-') {
            return None;
        }
        let version = hex(&bytes[..2])?;
        let (trace, span, flags) =
            (hex(&bytes[3..35])?, hex(&bytes[36..52])?, hex(&bytes[53..55])?);
        // Later versions may add fields; version 0 has exactly these, and ff is forbidden.
        let is_longer = bytes.len() > 55;
        let is_known = match version {
            0 => !is_longer,
            0xff => false,
            _ => !is_longer || bytes[55] == b'-',
        };
        let span = span as u64;
        (is_known && trace != 0 && span != 0).then_some(Self {
            trace,
            span,
            is_sampled: flags & 1 == 1,
        })
    }

    /// As [`Self::parse`] reads it.
    #[must_use]
    pub fn traceparent(&self) -> String {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = String::with_capacity(55);
        let mut digits = |value: u128, count: u32| {
            for at in (0..count).rev() {
                // Four bits are below 16.
                text.push(DIGITS[(value >> (4 * at)) as usize & 15] as char);
            }
            text.push('-');
        };
        digits(0, 2);
        digits(self.trace, 32);
        digits(self.span.into(), 16);
        digits(self.is_sampled.into(), 2);
        text.pop();
        text
    }

    /// 32 hexadecimal digits.
    #[must_use]
    pub fn trace_id(&self) -> String {
        format!("{:032x}", self.trace)
    }

    /// 16 hexadecimal digits.
    #[must_use]
    pub fn span_id(&self) -> String {
        format!("{:016x}", self.span)
    }

    /// Whether a traceparent says that its trace is sampled, without reading the rest of it.
    #[must_use]
    pub fn says_sampled(traceparent: &str) -> bool {
        traceparent.len() == 55 && traceparent.ends_with('1')
    }
}

fn hex(digits: &[u8]) -> Option<u128> {
    let mut value = 0;
    for digit in digits {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        value = value << 4 | u128::from(digit);
    }
    Some(value)
}

/// A number that is not 0 and that nobody else draws: SplitMix64 from a random start per thread.
pub(crate) fn new_id() -> u64 {
    thread_local!(static STATE: Cell<u64> = Cell::new(rand::random()));
    loop {
        let id = STATE.with(|state| {
            let next = state.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
            state.set(next);
            let mixed = (next ^ (next >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        });
        if id != 0 {
            return id;
        }
    }
}

/// Nanoseconds since 1970 UTC; never goes back inside a process.
pub(crate) fn now_ns() -> u64 {
    static START: OnceLock<(Instant, u64)> = OnceLock::new();
    let (began, wall_ns) = START.get_or_init(|| {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        (Instant::now(), nanos(wall))
    });
    wall_ns + nanos(began.elapsed())
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
