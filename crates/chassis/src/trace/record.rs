//! What is known of a finished span.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use opentelemetry::trace::{
    Link, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState,
};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

use super::context::{Context, new_id};

/// Attributes of one span; more are left out.
const ATTRIBUTES_MAX: usize = 10;
/// Phases of one span; more are left out.
const PHASES_MAX: usize = 4;
/// Links of one span: a batch links to each of the writes that it served.
const LINKS_MAX: usize = 1_024;

/// The value of an attribute.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Value {
    /// None.
    #[default]
    Empty,
    /// A number.
    Number(u64),
    /// Yes or no.
    Bool(bool),
    /// One of a few words.
    Word(&'static str),
    /// Text.
    Text(Arc<str>),
}

impl Value {
    /// As text.
    #[must_use]
    pub fn text(&self) -> Cow<'_, str> {
        match self {
            Self::Empty => Cow::Borrowed(""),
            Self::Number(number) => Cow::Owned(number.to_string()),
            Self::Bool(is) => Cow::Borrowed(if *is { "true" } else { "false" }),
            Self::Word(word) => Cow::Borrowed(word),
            Self::Text(text) => Cow::Borrowed(text),
        }
    }

    fn to_otel(&self) -> opentelemetry::Value {
        match self {
            Self::Number(number) => match i64::try_from(*number) {
                Ok(number) => number.into(),
                Err(_) => number.to_string().into(),
            },
            Self::Bool(is) => (*is).into(),
            other => other.text().into_owned().into(),
        }
    }
}

macro_rules! value_from {
    ($($from:ty => |$it:ident| $value:expr;)*) => {$(
        impl From<$from> for Value {
            fn from($it: $from) -> Self {
                $value
            }
        }
    )*};
}
value_from! {
    u64 => |it| Self::Number(it);
    u32 => |it| Self::Number(it.into());
    usize => |it| Self::Number(it as u64);
    bool => |it| Self::Bool(it);
    &'static str => |it| Self::Word(it);
    Arc<str> => |it| Self::Text(it);
    &Arc<str> => |it| Self::Text(Arc::clone(it));
    String => |it| Self::Text(it.into());
}

#[derive(Clone, Copy, Debug, Default)]
struct Phase {
    name: &'static str,
    start_ns: u64,
    end_ns: u64,
}

/// A span, finished or not.
#[derive(Clone, Debug)]
pub struct Record {
    /// Who recorded it: `writeback`, `conversion`, `block-store`.
    pub service: &'static str,
    /// What it is.
    pub name: &'static str,
    /// Where it is in its trace.
    pub context: Context,
    /// The span above it; 0: none.
    pub parent: u64,
    /// The span above it is another process's.
    pub is_parent_remote: bool,
    /// Nanoseconds since 1970 UTC.
    pub start_ns: u64,
    /// Nanoseconds since 1970 UTC.
    pub end_ns: u64,
    /// What went wrong; `None`: nothing.
    pub error: Option<Box<str>>,
    /// Spans of other traces that it served.
    pub links: Vec<Context>,
    attributes: [(&'static str, Value); ATTRIBUTES_MAX],
    phases: [Phase; PHASES_MAX],
}

impl Record {
    pub(super) fn new(
        service: &'static str,
        name: &'static str,
        context: Context,
        start_ns: u64,
    ) -> Self {
        Self {
            service,
            name,
            context,
            parent: 0,
            is_parent_remote: false,
            start_ns,
            end_ns: start_ns,
            error: None,
            links: Vec::new(),
            attributes: Default::default(),
            phases: Default::default(),
        }
    }

    /// Adds an attribute, or replaces it.
    pub(super) fn set(&mut self, key: &'static str, value: Value) {
        let free = |(name, _): &&mut (&str, Value)| name.is_empty() || *name == key;
        if let Some(place) = self.attributes.iter_mut().find(free) {
            *place = (key, value);
        }
    }

    pub(super) fn link(&mut self, to: Context) {
        if self.links.len() < LINKS_MAX {
            self.links.push(to);
        }
    }

    /// Ends the phase under way, if any, and begins the next one.
    pub(super) fn phase(&mut self, name: &'static str, now_ns: u64) {
        self.end_phase(now_ns);
        if let Some(place) = self.phases.iter_mut().find(|phase| phase.name.is_empty()) {
            *place = Phase { name, start_ns: now_ns, end_ns: 0 };
        }
    }

    fn end_phase(&mut self, now_ns: u64) {
        let is_open = |phase: &&mut Phase| !phase.name.is_empty() && phase.end_ns == 0;
        if let Some(phase) = self.phases.iter_mut().find(is_open) {
            phase.end_ns = now_ns;
        }
    }

    pub(super) fn end(&mut self, now_ns: u64) {
        self.end_ns = now_ns;
        self.end_phase(now_ns);
    }

    /// The phases as spans of their own, below this one.
    pub(super) fn phases(&self) -> impl Iterator<Item = Self> + '_ {
        let phases = self.phases.iter().filter(|phase| !phase.name.is_empty());
        phases.map(|phase| {
            let context = Context { span: new_id(), ..self.context };
            let mut record = Self::new(self.service, phase.name, context, phase.start_ns);
            record.parent = self.context.span;
            record.end_ns = phase.end_ns;
            for key in ["volume", "io_end", "segment", "store"] {
                if let Some(value) = self.attribute(key) {
                    record.set(key, value.clone());
                }
            }
            record
        })
    }

    /// The value of an attribute.
    #[must_use]
    pub fn attribute(&self, key: &str) -> Option<&Value> {
        self.attributes().find(|(name, _)| *name == key).map(|(_, value)| value)
    }

    /// The number in an attribute; `None` if it is missing or none.
    #[must_use]
    pub fn number(&self, key: &str) -> Option<u64> {
        match self.attribute(key)? {
            Value::Number(number) => Some(*number),
            value => value.text().parse().ok(),
        }
    }

    /// All attributes.
    pub fn attributes(&self) -> impl Iterator<Item = (&'static str, &Value)> {
        let is_set = |(name, _): &&(&str, Value)| !name.is_empty();
        self.attributes.iter().filter(is_set).map(|(name, value)| (*name, value))
    }

    /// From start to end.
    #[must_use]
    pub fn duration(&self) -> Duration {
        Duration::from_nanos(self.end_ns.saturating_sub(self.start_ns))
    }

    /// Bytes that it keeps in memory, roughly.
    #[must_use]
    pub(crate) fn weight(&self) -> usize {
        let text = |(_, value): (_, &Value)| match value {
            Value::Text(text) => text.len(),
            _ => 0,
        };
        size_of::<Self>()
            + self.attributes().map(text).sum::<usize>()
            + self.error.as_ref().map_or(0, |error| error.len())
            + self.links.len() * size_of::<Context>()
    }

    /// For an exporter.
    pub(crate) fn to_otel(&self) -> SpanData {
        let at = |ns| UNIX_EPOCH + Duration::from_nanos(ns);
        let attributes = self.attributes();
        let attributes = attributes.map(|(key, value)| KeyValue::new(key, value.to_otel()));
        let link = |context: &Context| Link::with_context(otel_context(*context, true));
        let mut links = SpanLinks::default();
        links.links = self.links.iter().map(link).collect();
        SpanData {
            span_context: otel_context(self.context, false),
            parent_span_id: SpanId::from(self.parent),
            parent_span_is_remote: self.is_parent_remote,
            span_kind: if self.parent == 0 { SpanKind::Server } else { SpanKind::Internal },
            name: Cow::Borrowed(self.name),
            start_time: at(self.start_ns),
            end_time: at(self.end_ns),
            attributes: attributes.collect(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links,
            status: match &self.error {
                Some(error) => Status::error(error.to_string()),
                None => Status::Unset,
            },
            instrumentation_scope: InstrumentationScope::builder(format!("endio.{}", self.service))
                .with_version(env!("CARGO_PKG_VERSION"))
                .build(),
        }
    }
}

/// What is exported was recorded, so its context says so.
fn otel_context(context: Context, is_remote: bool) -> SpanContext {
    SpanContext::new(
        TraceId::from(context.trace),
        SpanId::from(context.span),
        TraceFlags::SAMPLED,
        is_remote,
        TraceState::NONE,
    )
}
