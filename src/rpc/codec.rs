//! The codec of the contract's messages: prost's, which is given a message only after its parts were counted.
//! An empty part of two bytes becomes a hundred in memory, before anything could be checked; so does a value
//! in a text that is JSON.

use std::any::type_name;
use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::LazyLock;

use bytes::Buf as _;
use prost::Message;
use prost_types::field_descriptor_proto::Type;
use prost_types::{DescriptorProto, FileDescriptorSet};
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder};
use tonic_prost::{ProstCodec, ProstDecoder};

use super::pb::DESCRIPTOR_SET;
use super::status::status;
use crate::error::Error;

/// Limit of the texts, messages, lists of numbers and JSON values in one message, at every depth; above
/// `chat_parts_max`.
const PARTS_MAX: usize = 1 << 18;

/// Limit of depth, as prost's.
const DEPTH_MAX: usize = 100;

/// Length-delimited, in the lowest three bits of a key.
const DELIMITED: u64 = 2;

/// The type of a text that is JSON.
const JSON: &str = "JSON";

/// By message and field: the message that is its type, or [`JSON`].
type Fields = HashMap<String, HashMap<u64, String>>;

static FIELDS: LazyLock<Fields> = LazyLock::new(|| {
    let files = FileDescriptorSet::decode(DESCRIPTOR_SET).unwrap_or_default();
    let mut fields = Fields::new();
    for file in &files.file {
        file.message_type.iter().for_each(|message| note(&mut fields, file.package(), message));
    }
    fields
});

fn note(fields: &mut Fields, scope: &str, message: &DescriptorProto) {
    let name = format!("{scope}.{}", message.name());
    message.nested_type.iter().for_each(|nested| note(fields, &name, nested));
    let typed = message.field.iter().filter_map(|field| {
        let kind = match field.r#type() {
            Type::Message => field.type_name().trim_start_matches('.'),
            Type::String if field.name().ends_with("_json") => JSON,
            _ => return None,
        };
        Some((u64::try_from(field.number()).ok()?, kind.to_owned()))
    });
    let typed = typed.collect();
    fields.insert(name, typed);
}

/// Decodes messages of a limited number of parts.
#[derive(Debug, Clone)]
pub(crate) struct CountingCodec<T, U>(ProstCodec<T, U>);

impl<T, U> Default for CountingCodec<T, U> {
    fn default() -> Self {
        Self(ProstCodec::default())
    }
}

/// The decoder of [`CountingCodec`].
#[derive(Debug)]
pub(crate) struct CountingDecoder<U>(ProstDecoder<U>, PhantomData<U>);

impl<T, U> Codec for CountingCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = <ProstCodec<T, U> as Codec>::Encoder;
    type Decoder = CountingDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        self.0.encoder()
    }

    fn decoder(&mut self) -> Self::Decoder {
        CountingDecoder(self.0.decoder(), PhantomData)
    }
}

impl<U: Message + Default> Decoder for CountingDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, bytes: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let name = type_name::<U>().rsplit("::").next().unwrap_or_default();
        let mut left = PARTS_MAX;
        // What else is malformed prost says.
        match count(bytes.chunk(), &format!("mlxd.v1.{name}"), DEPTH_MAX, &mut left) {
            Err(Fault::TooMany) => {
                let why = format!("at most {PARTS_MAX} texts, messages and JSON values in one message");
                Err(status(&Error::field("message", why)))
            }
            Err(Fault::Group) => Err(status(&Error::field("message", "groups are not in the contract"))),
            Ok(()) | Err(Fault::Malformed) => self.0.decode(bytes),
        }
    }

    fn buffer_settings(&self) -> BufferSettings {
        self.0.buffer_settings()
    }
}

/// Why the parts of a message are not counted to the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// There are more than allowed.
    TooMany,
    /// It has a group, which prost would skip without a word.
    Group,
    /// Prost refuses it.
    Malformed,
}

/// Takes the parts of a message from `left`.
fn count(mut bytes: &[u8], message: &str, depth: usize, left: &mut usize) -> Result<(), Fault> {
    let fields = FIELDS.get(message);
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let length = match key & 7 {
            0 => varint(&mut bytes).map(|_| 0)?,
            1 => 8,
            DELIMITED => usize::try_from(varint(&mut bytes)?).map_err(|_| Fault::Malformed)?,
            3 | 4 => return Err(Fault::Group),
            5 => 4,
            _ => return Err(Fault::Malformed),
        };
        let (content, rest) = bytes.split_at_checked(length).ok_or(Fault::Malformed)?;
        bytes = rest;
        if key & 7 == DELIMITED {
            take(1, left)?;
            match fields.and_then(|fields| fields.get(&(key >> 3))).map(String::as_str) {
                Some(JSON) => take(values(content), left)?,
                Some(kind) => count(content, kind, depth.checked_sub(1).ok_or(Fault::Malformed)?, left)?,
                None => {}
            }
        }
    }
    Ok(())
}

fn take(parts: usize, left: &mut usize) -> Result<(), Fault> {
    *left = left.checked_sub(parts).ok_or(Fault::TooMany)?;
    Ok(())
}

/// Returns the most values that a JSON text can have: the marks that may stand before one.
fn values(json: &[u8]) -> usize {
    json.iter().filter(|byte| matches!(byte, b',' | b':' | b'[' | b'{')).count()
}

fn varint(bytes: &mut &[u8]) -> Result<u64, Fault> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first().ok_or(Fault::Malformed)?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(Fault::Malformed)
}

#[cfg(test)]
mod tests {
    use super::super::pb;
    use super::*;

    fn parts(request: &pb::GenerateRequest) -> usize {
        let mut left = PARTS_MAX;
        count(&request.encode_to_vec(), "mlxd.v1.GenerateRequest", DEPTH_MAX, &mut left).unwrap();
        PARTS_MAX - left
    }

    #[test]
    fn parts_are_counted_at_every_depth_and_texts_are_not_looked_into() {
        use pb::generate_request::Input;
        let text = |text: &str| pb::ContentPart { part: Some(pb::content_part::Part::Text(text.into())) };
        // As bytes, the text is a thousand empty messages.
        let content = vec![text(&"\n\0".repeat(1000)), text("b")];
        let message = pb::Message { content, ..Default::default() };
        let chat = pb::ChatInput { messages: vec![message; 3], ..Default::default() };
        let request = pb::GenerateRequest { input: Some(Input::Chat(chat)), ..Default::default() };
        // The chat, and in each message itself, two parts and their texts.
        assert_eq!(parts(&request), 1 + 3 * 5);
    }

    #[test]
    fn values_in_json_texts_are_counted_over_all_of_them() {
        let tool =
            |json: String| pb::ToolDefinition { parameters_json: json, ..pb::ToolDefinition::default() };
        let taken = |tools| {
            let chat = pb::ChatInput { tools, ..Default::default() };
            let mut left = PARTS_MAX;
            let counted = count(&chat.encode_to_vec(), "mlxd.v1.ChatInput", DEPTH_MAX, &mut left);
            counted.map(|()| PARTS_MAX - left)
        };
        // The tool, its text, and in that the marks.
        assert_eq!(taken(vec![tool(r#"{"a":[0,0]}"#.into())]), Ok(2 + 4));
        let half = tool(format!("[{}0]", "0,".repeat(PARTS_MAX / 2)));
        assert!(taken(vec![half.clone()]).is_ok());
        assert_eq!(taken(vec![half; 2]), Err(Fault::TooMany));
    }

    #[test]
    fn a_malformed_message_is_left_to_prost() {
        for bytes in [&[0x0a, 0x7f, 1][..], &[0x0f], &[0x80; 20]] {
            let mut left = PARTS_MAX;
            let counted = count(bytes, "mlxd.v1.GenerateRequest", DEPTH_MAX, &mut left);
            assert_eq!(counted, Err(Fault::Malformed));
            assert!(pb::GenerateRequest::decode(bytes).is_err());
        }
    }

    #[test]
    fn a_group_is_refused_which_prost_would_skip() {
        // The field 100, begun and ended, then one that is known.
        for bytes in [&[0xa3, 0x06, 0xa4, 0x06, 0x0a, 0][..], &[0x0b, 0x0c]] {
            let mut left = PARTS_MAX;
            let counted = count(bytes, "mlxd.v1.GenerateRequest", DEPTH_MAX, &mut left);
            assert_eq!(counted, Err(Fault::Group));
        }
        assert!(pb::GenerateRequest::decode(&[0xa3, 0x06, 0xa4, 0x06][..]).is_ok());
    }
}
