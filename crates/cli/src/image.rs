//! Images on their way from a service into a file.
//!
//! Frames arrive in ascending order; several batches are verified at the same time on blocking threads and written one
//! after the other: a filesystem lets one thread at a time write to a file, and those that wait for it spin. What was
//! written is compared with the digest that the service promised before anything gets the name that was asked for.

mod digest;
mod file;

use std::{cell::RefCell, os::unix::fs::FileExt, sync::Arc};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use tidemark_block::{
    Checksum128, Codec, Extent, FrameDecoder, FrameError, Geometry, ImageDigest, UnverifiedFrame,
    VerifiedFrame,
};
use tidemark_disk::durable;

use digest::ReceivedDigest;
pub use file::ImageFile;

use crate::{
    failure::{self, Failure},
    progress::Progress,
};

/// Batches of frames that are verified at the same time. Each holds about 1 MiB of blocks.
const BATCHES_AT_ONCE: usize = 4;

/// One message of a stream of frames, whichever service it comes from.
#[derive(Debug)]
pub enum Message {
    /// Whole encoded frames.
    Frames(Bytes),
    /// The last message.
    End {
        /// Of all frames, zero blocks included.
        blocks_sent: u64,
        /// What the whole image must have; none where only changes are sent.
        digest: Option<ImageDigest>,
    },
}

/// What was written.
#[derive(Debug, PartialEq, Eq)]
pub struct Received {
    /// Bytes that are not zero.
    pub data_bytes: u64,
    /// Computed over what was written, and equal to what was promised.
    pub digest: Option<ImageDigest>,
}

/// Writes a stream of frames into `file` and proves it. The file still has to be [finished](ImageFile::finish).
///
/// # Errors
/// The stream breaks or ends early, a frame or the whole image does not match, or the file cannot be written.
pub async fn receive(
    messages: impl Stream<Item = Result<Message, Failure>>,
    geometry: Geometry,
    file: &Arc<ImageFile>,
    progress: &Progress,
) -> Result<Received, Failure> {
    let steps = messages
        .map(|message| async move {
            match message? {
                Message::Frames(frames) => {
                    let verified =
                        tokio::task::spawn_blocking(move || verify_frames(frames, geometry));
                    Ok(Step::Verified(verified.await.map_err(|_| stopped())??))
                }
                Message::End {
                    blocks_sent,
                    digest,
                } => Ok::<_, Failure>(Step::End {
                    blocks_sent,
                    digest,
                }),
            }
        })
        .buffered(BATCHES_AT_ONCE);
    let mut steps = std::pin::pin!(steps);
    let mut received = ReceivedDigest::new(geometry);
    let mut blocks = 0;
    let mut data_bytes = 0;
    while let Some(step) = steps.next().await {
        match step? {
            Step::Verified(frames) => {
                let file = Arc::clone(file);
                let written =
                    tokio::task::spawn_blocking(move || write_frames(&frames, geometry, &file));
                for run in written.await.map_err(|_| stopped())?? {
                    received.push(&run)?;
                    blocks += run.extent.count().get();
                    if run.checksums.is_some() {
                        data_bytes += geometry.bytes(run.extent.count());
                    }
                }
                progress.at(geometry.offset_of(received.next()).get());
            }
            Step::End {
                blocks_sent,
                digest,
            } => {
                if blocks != blocks_sent {
                    return Err(failure::corrupt(format!(
                        "{blocks} blocks arrived, the service says that it sent {blocks_sent}"
                    )));
                }
                return Ok(Received {
                    data_bytes,
                    digest: digest
                        .map(|promised| received.prove(promised))
                        .transpose()?,
                });
            }
        }
    }
    Err(Failure::new(
        failure::Kind::Unavailable,
        "UNREACHABLE",
        "the stream ended before the image was whole",
        "look at the service's log, and try again",
    ))
}

enum Step {
    Verified(Vec<VerifiedFrame>),
    End {
        blocks_sent: u64,
        digest: Option<ImageDigest>,
    },
}

/// Adjacent blocks that were written together.
#[derive(Debug)]
struct Run {
    extent: Extent,
    /// Of each; `None` where all are zero.
    checksums: Option<Vec<Checksum128>>,
}

thread_local! {
    static DECODER: RefCell<FrameDecoder> = RefCell::new(FrameDecoder::new());
}

fn verify_frames(mut frames: Bytes, geometry: Geometry) -> Result<Vec<VerifiedFrame>, Failure> {
    let mut verified = Vec::new();
    while !frames.is_empty() {
        let (frame, rest) = UnverifiedFrame::split(frames).map_err(|e| refused(&e))?;
        frames = rest;
        let frame = DECODER
            .with_borrow_mut(|decoder| frame.verify(geometry, decoder))
            .map_err(|e| refused(&e))?;
        verified.push(frame);
    }
    Ok(verified)
}

fn write_frames(
    frames: &[VerifiedFrame],
    geometry: Geometry,
    file: &ImageFile,
) -> Result<Vec<Run>, Failure> {
    let mut runs = Vec::new();
    for frame in frames {
        write_frame(frame, geometry, file, &mut runs)
            .map_err(|e| Failure::io(format_args!("write {}", file.shown().display()), &e))?;
    }
    if let (Some(first), Some(last)) = (runs.first(), runs.last()) {
        let (offset, length) = place(
            geometry,
            Extent::between(first.extent.start(), last.extent.end()),
        );
        durable::start_writeback(file.file(), offset, length);
    }
    Ok(runs)
}

fn write_frame(
    frame: &VerifiedFrame,
    geometry: Geometry,
    file: &ImageFile,
    runs: &mut Vec<Run>,
) -> std::io::Result<()> {
    if frame.codec() == Codec::Zero {
        for &extent in frame.extents() {
            let (offset, length) = place(geometry, extent);
            file.zero(offset, length)?;
            runs.push(Run {
                extent,
                checksums: None,
            });
        }
        return Ok(());
    }
    let mut data: &[u8] = frame.data();
    let mut checksums = frame.checksums();
    for &extent in frame.extents() {
        let (offset, length) = place(geometry, extent);
        // A frame holds at most 1 MiB of data.
        let (bytes, rest) = data.split_at(usize::try_from(length).unwrap_or(usize::MAX));
        file.file().write_all_at(bytes, offset)?;
        data = rest;
        let blocks = extent.iter().count();
        runs.push(Run {
            extent,
            checksums: Some(checksums.by_ref().take(blocks).collect()),
        });
    }
    Ok(())
}

fn place(geometry: Geometry, extent: Extent) -> (u64, u64) {
    (
        geometry.offset_of(extent.start()).get(),
        geometry.bytes(extent.count()),
    )
}

fn refused(error: &FrameError) -> Failure {
    match error {
        FrameError::Version(_) | FrameError::Unknown(_) => Failure::protocol(error),
        error => failure::corrupt(format!("what arrived cannot be trusted: {error}")),
    }
}

fn stopped() -> Failure {
    Failure::new(
        failure::Kind::Failed,
        "INTERNAL",
        "a writing thread stopped",
        "report it",
    )
}
