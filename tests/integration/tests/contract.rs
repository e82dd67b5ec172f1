//! The contract explains itself: every message, field, method and value has a comment, and every
//! service file opens with commands that work.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use endio_api::DESCRIPTORS;
use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FileDescriptorProto, FileDescriptorSet};

fn files() -> Vec<FileDescriptorProto> {
    let set = FileDescriptorSet::decode(DESCRIPTORS).unwrap();
    set.file.into_iter().filter(|file| file.package().starts_with("endio.")).collect()
}

/// Paths of source locations that have a comment in front of them.
fn commented(file: &FileDescriptorProto) -> BTreeSet<Vec<i32>> {
    let info = file.source_code_info.as_ref().expect("built with source info");
    info.location
        .iter()
        .filter(|location| !location.leading_comments().trim().is_empty())
        .map(|location| location.path.clone())
        .collect()
}

/// Names and paths of everything in a file that a reader may ask about. The numbers are those of
/// `descriptor.proto`.
fn items(file: &FileDescriptorProto) -> Vec<(String, Vec<i32>)> {
    let mut items = Vec::new();
    for (number, message) in (0..).zip(&file.message_type) {
        messages(message, message.name().to_owned(), vec![4, number], &mut items);
    }
    for (number, list) in (0..).zip(&file.enum_type) {
        items.push((list.name().to_owned(), vec![5, number]));
        for (value, described) in (0..).zip(&list.value) {
            items.push((described.name().to_owned(), vec![5, number, 2, value]));
        }
    }
    for (number, service) in (0..).zip(&file.service) {
        items.push((service.name().to_owned(), vec![6, number]));
        for (method, described) in (0..).zip(&service.method) {
            let name = format!("{}.{}", service.name(), described.name());
            items.push((name, vec![6, number, 2, method]));
        }
    }
    items
}

fn messages(
    message: &DescriptorProto,
    name: String,
    path: Vec<i32>,
    items: &mut Vec<(String, Vec<i32>)>,
) {
    let is_map = message.options.as_ref().is_some_and(|options| options.map_entry());
    if is_map {
        return;
    }
    for (number, field) in (0..).zip(&message.field) {
        let at = path.iter().copied().chain([2, number]).collect();
        items.push((format!("{name}.{}", field.name()), at));
    }
    for (number, nested) in (0..).zip(&message.nested_type) {
        let at = path.iter().copied().chain([3, number]).collect();
        messages(nested, format!("{name}.{}", nested.name()), at, items);
    }
    items.push((name, path));
}

#[test]
fn everything_in_the_contract_has_a_comment() {
    let mut missing = Vec::new();
    for file in files() {
        let commented = commented(&file);
        for (name, path) in items(&file) {
            if !commented.contains(&path) {
                missing.push(format!("{}: {name}", file.name()));
            }
        }
    }
    assert!(missing.is_empty(), "{} without a comment:\n{}", missing.len(), missing.join("\n"));
}

#[test]
fn a_field_without_a_comment_would_be_found() {
    let mut file = files().into_iter().find(|file| !file.message_type.is_empty()).unwrap();
    let (name, path) = items(&file).into_iter().find(|(name, _)| name.contains('.')).unwrap();
    let info = file.source_code_info.as_mut().unwrap();
    info.location.retain(|location| location.path != path);
    assert!(!commented(&file).contains(&path), "{name} still counts as documented");
}

/// The lines of a file that show a command.
fn examples(source: &str) -> Vec<String> {
    let comment = |line: &str| line.trim().strip_prefix("//").map(|rest| rest.trim().to_owned());
    source.lines().filter_map(comment).filter(|line| line.starts_with("grpcurl ")).collect()
}

struct Types {
    messages: BTreeMap<String, DescriptorProto>,
    methods: BTreeMap<String, String>,
}

fn types() -> Types {
    let (mut messages, mut methods) = (BTreeMap::new(), BTreeMap::new());
    for file in files() {
        for message in &file.message_type {
            messages.insert(format!(".{}.{}", file.package(), message.name()), message.clone());
        }
        for service in &file.service {
            for method in &service.method {
                let name = format!("{}.{}/{}", file.package(), service.name(), method.name());
                methods.insert(name, method.input_type().to_owned());
            }
        }
    }
    Types { messages, methods }
}

/// Insists that a JSON object has only fields of the message, of fitting JSON types.
fn fits(types: &Types, message: &str, json: &serde_json::Value, example: &str) {
    let described = &types.messages[message];
    for (name, value) in json.as_object().unwrap_or_else(|| panic!("no object: {example}")) {
        let field = described.field.iter().find(|field| field.name() == name);
        let field = field.unwrap_or_else(|| panic!("{message} has no field {name}: {example}"));
        assert_ne!(field.label(), Label::Repeated, "an example of a list: {example}");
        let is_fitting = match field.r#type() {
            Type::String | Type::Bytes | Type::Enum => value.is_string(),
            Type::Bool => value.is_boolean(),
            Type::Message => {
                fits(types, field.type_name(), value, example);
                true
            }
            _ => value.is_number() || value.is_string(),
        };
        assert!(is_fitting, "{name} is {value}: {example}");
    }
}

#[test]
fn every_service_file_opens_with_commands_that_fit_the_contract() {
    let types = types();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    for file in files().into_iter().filter(|file| !file.service.is_empty()) {
        let source = std::fs::read_to_string(root.join(file.name())).unwrap();
        let examples = examples(&source);
        assert!(!examples.is_empty(), "{} shows no command", file.name());
        for example in examples {
            let method = example.split_whitespace().last().unwrap();
            let input = types.methods.get(method);
            let input = input.unwrap_or_else(|| panic!("no such method: {example}"));
            assert!(method.starts_with(file.package()), "of another file: {example}");
            let Some((_, rest)) = example.split_once("-d '") else { continue };
            let (json, _) = rest.split_once('\'').expect("the quote is closed");
            let json = serde_json::from_str(json).unwrap_or_else(|e| panic!("{e}: {example}"));
            fits(&types, input, &json, &example);
        }
    }
}
