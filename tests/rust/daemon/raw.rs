//! HTTP/2 as bytes, for what no library sends.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const GOAWAY: u8 = 7;
const SETTINGS: u8 = 4;

pub const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// The error code CANCEL.
pub const CANCEL: [u8; 4] = [0, 0, 0, 8];

pub const HEALTH: &str = "/grpc.health.v1.Health/Check";
pub const GENERATE: &str = "/mlxd.v1.InferenceService/Generate";

/// The message of a health check's answer: SERVING.
pub const SERVING: [u8; 7] = [0, 0, 0, 0, 2, 8, 1];

pub struct Frame {
    pub kind: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

/// A connection whose frames the test writes itself.
pub struct Raw<S>(S);

impl<S: AsyncRead + AsyncWrite + Unpin> Raw<S> {
    pub async fn begin(mut stream: S) -> Self {
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
        Self(stream)
    }

    pub async fn write(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    pub async fn read(&mut self) -> Frame {
        let mut head = [0; 9];
        self.0.read_exact(&mut head).await.unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        self.0.read_exact(&mut payload).await.unwrap();
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        Frame { kind: head[3], stream, payload }
    }

    /// Reads until a frame of this kind comes on the stream.
    pub async fn until(&mut self, kind: u8, stream: u32) -> Frame {
        loop {
            let frame = self.read().await;
            let text = String::from_utf8_lossy(&frame.payload).into_owned();
            assert!(frame.kind != GOAWAY || kind == GOAWAY, "GOAWAY: {text}");
            if (frame.kind, frame.stream) == (kind, stream) {
                return frame;
            }
        }
    }

    /// Checks that calls are still answered.
    pub async fn is_served(&mut self, stream: u32) {
        self.write(&call(stream, "localhost", HEALTH, &[])).await;
        assert_eq!(self.until(DATA, stream).await.payload, SERVING);
    }
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// The beginning of a call.
pub fn headers(stream: u32, authority: &str, method: &str) -> Vec<u8> {
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    let fields = [
        vec![0x83, 0x86, 0x04],
        text(method),
        // As gRPC's C core writes it: with its name, and entering the table of fields that were sent.
        vec![0x40],
        text(":authority"),
        text(authority),
        vec![0],
        text("content-type"),
        text("application/grpc"),
    ];
    frame(HEADERS, END_HEADERS, stream, &fields.concat())
}

/// A whole call.
pub fn call(stream: u32, authority: &str, method: &str, message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let body = [&[0], &length[..], message].concat();
    [headers(stream, authority, method), frame(DATA, END_STREAM, stream, &body)].concat()
}

/// A health check whose authority is the one that the last call sent.
pub fn same_authority(stream: u32) -> Vec<u8> {
    let sent = call(stream, "", HEALTH, &[]);
    let field = [&[0x40, 10][..], b":authority", &[0]].concat();
    let place = sent.windows(field.len()).position(|bytes| bytes == field).unwrap();
    let mut bytes = [&sent[..place], &[0xbe], &sent[place + field.len()..]].concat();
    bytes[2] -= u8::try_from(field.len() - 1).unwrap();
    bytes
}
