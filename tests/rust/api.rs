//! The API, one line per symbol, as a snapshot: whoever changes the contract changes a file and sees it. Also
//! holds the contract to its own rules: every symbol has a comment, no enum value is unprefixed.

#![allow(clippy::unwrap_used, reason = "a test that cannot read its subject fails")]

use std::collections::BTreeSet;

use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
    ServiceDescriptorProto,
};

const PACKAGE: &str = "mlxd.v1";

/// Field numbers of descriptor.proto, which make up the path of a symbol's comment.
const MESSAGES: i32 = 4;
const ENUMS: i32 = 5;
const SERVICES: i32 = 6;
const MEMBERS: i32 = 2;
const ONEOFS: i32 = 8;

/// The project's own files; the set holds what they import, too.
fn contract() -> Vec<FileDescriptorProto> {
    let set = include_bytes!(concat!(env!("OUT_DIR"), "/mlxd_descriptor.bin"));
    let set = FileDescriptorSet::decode(set.as_slice()).unwrap();
    set.file.into_iter().filter(|file| file.package() == PACKAGE).collect()
}

/// A symbol's line, and where its comment is.
type Symbol = (String, Vec<i32>);

fn index(index: usize) -> i32 {
    i32::try_from(index).unwrap()
}

fn symbols(file: &FileDescriptorProto) -> Vec<Symbol> {
    let mut found = Vec::new();
    for (at, service) in file.service.iter().enumerate() {
        add_service(&mut found, service, index(at));
    }
    for (at, message) in file.message_type.iter().enumerate() {
        add_message(&mut found, message, index(at));
    }
    for (at, kind) in file.enum_type.iter().enumerate() {
        add_enum(&mut found, kind, index(at));
    }
    found
}

fn add_service(found: &mut Vec<Symbol>, service: &ServiceDescriptorProto, at: i32) {
    let name = service.name();
    found.push((format!("service {name}"), vec![SERVICES, at]));
    for (number, method) in service.method.iter().enumerate() {
        let streamed = |streaming| if streaming { "stream " } else { "" };
        let line = format!(
            "rpc {name}.{}({}{}) returns ({}{})",
            method.name(),
            streamed(method.client_streaming()),
            bare(method.input_type()),
            streamed(method.server_streaming()),
            bare(method.output_type()),
        );
        found.push((line, vec![SERVICES, at, MEMBERS, index(number)]));
    }
}

fn add_message(found: &mut Vec<Symbol>, message: &DescriptorProto, at: i32) {
    let name = message.name();
    found.push((format!("message {name}"), vec![MESSAGES, at]));
    for (number, field) in message.field.iter().enumerate() {
        let line = format!("field {name}.{} = {}: {}", field.name(), field.number(), kind(message, field));
        found.push((line, vec![MESSAGES, at, MEMBERS, index(number)]));
    }
    for (number, oneof) in message.oneof_decl.iter().enumerate() {
        // The compiler gives an `optional` field a oneof of its own.
        if !oneof.name().starts_with('_') {
            found.push((format!("oneof {name}.{}", oneof.name()), vec![MESSAGES, at, ONEOFS, index(number)]));
        }
    }
    for range in &message.reserved_range {
        // The end of a range is not part of it, as in descriptor.proto.
        let line = format!("reserved {name} = {} to {}", range.start(), range.end() - 1);
        found.push((line, vec![MESSAGES, at]));
    }
    let is_flat = message.nested_type.iter().all(is_map) && message.enum_type.is_empty();
    assert!(is_flat, "{name}: messages and enums stand at the top level");
}

fn add_enum(found: &mut Vec<Symbol>, kind: &EnumDescriptorProto, at: i32) {
    let name = kind.name();
    found.push((format!("enum {name}"), vec![ENUMS, at]));
    for (number, value) in kind.value.iter().enumerate() {
        let line = format!("value {name}.{} = {}", value.name(), value.number());
        found.push((line, vec![ENUMS, at, MEMBERS, index(number)]));
    }
}

fn is_map(message: &DescriptorProto) -> bool {
    message.options.as_ref().is_some_and(prost_types::MessageOptions::map_entry)
}

fn bare(name: &str) -> &str {
    let name = name.trim_start_matches('.');
    name.strip_prefix("mlxd.v1.").unwrap_or(name)
}

fn kind(message: &DescriptorProto, field: &FieldDescriptorProto) -> String {
    let entry = message.nested_type.iter().filter(|nested| is_map(nested));
    let entry = entry.into_iter().find(|entry| {
        field
            .type_name()
            .strip_suffix(entry.name())
            .is_some_and(|rest| rest.ends_with(&format!("{}.", message.name())))
    });
    if let Some(entry) = entry {
        let parts: Vec<String> = entry.field.iter().map(scalar).collect();
        return format!("map<{}>", parts.join(", "));
    }
    let oneof = field.oneof_index.map(|at| message.oneof_decl[usize::try_from(at).unwrap()].name());
    let kind = scalar(field);
    match (field.label(), field.proto3_optional(), oneof) {
        (Label::Repeated, ..) => format!("repeated {kind}"),
        (_, true, _) => format!("optional {kind}"),
        (_, false, Some(oneof)) => format!("{kind} in oneof {oneof}"),
        (_, false, None) => kind,
    }
}

fn scalar(field: &FieldDescriptorProto) -> String {
    match field.r#type() {
        Type::Message | Type::Enum => bare(field.type_name()).to_owned(),
        plain => plain.as_str_name().trim_start_matches("TYPE_").to_lowercase(),
    }
}

#[test]
fn the_api_is_what_the_snapshot_says() {
    let lines: Vec<String> = contract().iter().flat_map(symbols).map(|(line, _)| line).collect();
    insta::assert_snapshot!(lines.join("\n"));
}

#[test]
fn every_symbol_has_a_comment() {
    let mut bare = Vec::new();
    for file in contract() {
        let locations = file.source_code_info.iter().flat_map(|info| &info.location);
        let commented: BTreeSet<&[i32]> = locations
            .filter(|location| !location.leading_comments().trim().is_empty())
            .map(|location| location.path.as_slice())
            .collect();
        let missing = symbols(&file).into_iter().filter(|(_, path)| !commented.contains(path.as_slice()));
        bare.extend(missing.map(|(line, _)| line));
    }
    assert!(bare.is_empty(), "without a comment:\n{}", bare.join("\n"));
}

#[test]
fn enum_values_are_prefixed_and_begin_with_unspecified() {
    for kind in contract().iter().flat_map(|file| &file.enum_type) {
        let mut prefix = String::new();
        for letter in kind.name().chars() {
            if letter.is_uppercase() && !prefix.is_empty() {
                prefix.push('_');
            }
            prefix.push(letter.to_ascii_uppercase());
        }
        for value in &kind.value {
            assert!(value.name().starts_with(&format!("{prefix}_")), "{} lacks {prefix}_", value.name());
        }
        assert_eq!(kind.value[0].name(), format!("{prefix}_UNSPECIFIED"));
        assert_eq!(kind.value[0].number(), 0);
    }
}

#[test]
fn every_rpc_has_messages_of_its_own() {
    let mut seen = BTreeSet::new();
    for service in contract().iter().flat_map(|file| &file.service) {
        for method in &service.method {
            // The one exception: both take a GenerateRequest, so that changing between them changes no
            // request.
            let shared = method.name() == "StreamGenerate";
            for name in [method.input_type(), method.output_type()] {
                assert!(name.starts_with(".mlxd.v1."), "{}: {name}", method.name());
                assert!(seen.insert(name) || (shared && name == ".mlxd.v1.GenerateRequest"), "{name} twice");
            }
        }
    }
}
