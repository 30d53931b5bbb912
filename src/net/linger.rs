//! Closes a connection gently: after the daemon has sent everything, it reads until the peer closes too. If
//! it closed at once, the peer's next write would fail, and many clients then drop what they have received
//! but not read.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// Bytes that are read at a time and discarded.
const DISCARD_BYTES: usize = 4096;

/// A stream whose shutdown waits for the peer's.
pub(super) struct Lingering<S> {
    stream: S,
    /// Time the peer has to close.
    limit: Duration,
    /// End of that time; set once our side is closed.
    until: Option<Pin<Box<Sleep>>>,
}

impl<S> Lingering<S> {
    pub(super) fn new(stream: S, limit: Duration) -> Self {
        Self { stream, limit, until: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Lingering<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Lingering<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.until.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
        }
        let until = this.until.get_or_insert_with(|| Box::pin(sleep(this.limit)));
        if until.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Ok(()));
        }
        loop {
            let mut discarded = [0; DISCARD_BYTES];
            let mut buffer = ReadBuf::new(&mut discarded);
            match ready!(Pin::new(&mut this.stream).poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => {}
                // The peer has closed, orderly or not.
                Ok(()) | Err(_) => return Poll::Ready(Ok(())),
            }
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn sent_bytes_can_be_read_though_the_peer_went_on_writing() {
        let (ours, mut theirs) = duplex(64);
        let closing = tokio::spawn(async move {
            let mut ours = Lingering::new(ours, Duration::from_secs(60));
            ours.write_all(b"the last word").await?;
            ours.shutdown().await
        });
        for _ in 0..100 {
            theirs.write_all(&[0; 32]).await.unwrap();
        }
        let mut heard = vec![0; 13];
        theirs.read_exact(&mut heard).await.unwrap();
        assert_eq!(heard, b"the last word");
        drop(theirs);
        closing.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_peer_that_does_not_close_is_left_after_the_limit() {
        let (ours, _theirs) = duplex(64);
        Lingering::new(ours, Duration::from_millis(1)).shutdown().await.unwrap();
    }
}
