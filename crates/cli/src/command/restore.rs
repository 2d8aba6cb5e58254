//! `tidemark restore`.

use std::{path::PathBuf, sync::Arc, time::Instant};

use futures::{Stream, StreamExt};
use tidemark_block::{BlockSize, Geometry, ImageDigest};
use tidemark_proto::{
    common::v1 as common,
    vault::v1::{Generation, RestoreRequest, RestoreResponse, restore_response},
};
use tonic::Streaming;

use crate::{
    args::{Global, RestoreArgs},
    failure::Failure,
    format,
    image::{self, ImageFile, Message},
    output,
    progress::Progress,
    report::Written,
};

pub(super) async fn run(global: &Global, args: RestoreArgs) -> Result<(), Failure> {
    let asked = args.generation;
    let written = write(
        global,
        asked.volume,
        asked.generation,
        args.output,
        args.force,
    )
    .await?;
    output::print(global.json, &written, &describe(&written))
}

/// Writes a generation's image to a file; without a number the newest.
pub(super) async fn write(
    global: &Global,
    volume: String,
    generation: Option<u64>,
    output: PathBuf,
    force: bool,
) -> Result<Written, Failure> {
    let began = Instant::now();
    let request = RestoreRequest {
        volume: volume.clone(),
        generation: generation.unwrap_or(0),
    };
    let mut answers = global.vault().await?.restore(request).await?.into_inner();
    let generation = header(&mut answers).await?;
    let geometry = geometry(generation.geometry.as_ref())?;
    let promised = digest(&generation.image_digest)?;

    let path = output.clone();
    let file = blocking(move || ImageFile::create(&path, geometry.length(), force)).await?;
    let file = Arc::new(file);
    let progress = Progress::bytes(
        &format!("{volume}@{}", generation.generation),
        geometry.length(),
    );
    let received = image::receive(messages(answers, promised), geometry, &file, &progress).await?;
    finish(file).await?;
    drop(progress);

    Ok(Written {
        volume,
        generation: Some(generation.generation),
        snapshot: None,
        since: None,
        output: output.display().to_string(),
        size: geometry.length(),
        data_bytes: received.data_bytes,
        image_digest: received.digest.map(|digest| digest.to_string()),
        took_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
    })
}

async fn header(answers: &mut Streaming<RestoreResponse>) -> Result<Generation, Failure> {
    match answers.message().await?.and_then(|answer| answer.message) {
        Some(restore_response::Message::Header(header)) => header
            .generation
            .ok_or_else(|| Failure::protocol("a restore without its generation")),
        _ => Err(Failure::protocol(
            "a restore does not begin with its header",
        )),
    }
}

fn messages(
    answers: Streaming<RestoreResponse>,
    promised: ImageDigest,
) -> impl Stream<Item = Result<Message, Failure>> {
    answers.map(move |answer| match answer?.message {
        Some(restore_response::Message::Frames(batch)) => Ok(Message::Frames(batch.frames)),
        Some(restore_response::Message::End(end)) => Ok(Message::End {
            blocks_sent: end.blocks_sent,
            digest: Some(promised),
        }),
        _ => Err(Failure::protocol("a second header amid a restore")),
    })
}

/// Parses a volume's shape off the wire.
pub(super) fn geometry(geometry: Option<&common::Geometry>) -> Result<Geometry, Failure> {
    let shape = geometry.ok_or_else(|| Failure::protocol("an image without its size"))?;
    BlockSize::new(shape.block_size)
        .and_then(|block_size| Geometry::new(shape.length, block_size))
        .map_err(Failure::protocol)
}

/// Parses an image digest off the wire.
pub(super) fn digest(bytes: &[u8]) -> Result<ImageDigest, Failure> {
    <[u8; 16]>::try_from(bytes)
        .map(ImageDigest::from_bytes)
        .map_err(|_| Failure::protocol(format_args!("a digest of {} bytes", bytes.len())))
}

/// Runs what touches files off the async threads.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Failure::from(anyhow::Error::new(error)))?
}

/// Makes the file durable and gives it its name.
pub(super) async fn finish(file: Arc<ImageFile>) -> Result<(), Failure> {
    blocking(move || {
        Arc::into_inner(file)
            .ok_or_else(|| Failure::from(anyhow::anyhow!("the image is still being written")))?
            .finish()
    })
    .await
}

/// A written image for people.
pub(super) fn describe(written: &Written) -> String {
    let mut fields = vec![("wrote", written.output.clone())];
    if let Some(generation) = written.generation {
        fields.push(("generation", format!("{}@{generation}", written.volume)));
    }
    if let Some(snapshot) = written.snapshot {
        let since = written.since.map_or_else(String::new, |old| {
            format!(", only what changed since {old}")
        });
        fields.push((
            "snapshot",
            format!("{snapshot} of {}{since}", written.volume),
        ));
    }
    fields.push((
        "size",
        format!(
            "{} ({} of data)",
            format::bytes(written.size),
            format::bytes(written.data_bytes)
        ),
    ));
    fields.push((
        "verified",
        written.image_digest.as_ref().map_or_else(
            || "each block's checksum".to_owned(),
            |digest| format!("each block's checksum, and the image digest {digest}"),
        ),
    ));
    fields.push(("took", format!("{} ms", written.took_ms)));
    format::fields(&fields)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_and_verified_is_told() {
        let written = Written {
            volume: "data".into(),
            generation: Some(7),
            snapshot: None,
            since: None,
            output: "restored.img".into(),
            size: 8 << 30,
            data_bytes: 3 << 20,
            image_digest: Some("ab".repeat(16)),
            took_ms: 1234,
        };
        insta::assert_snapshot!(describe(&written));
        insta::assert_json_snapshot!(written);
        let read = Written {
            generation: None,
            snapshot: Some(4),
            since: Some(3),
            image_digest: None,
            ..written
        };
        insta::assert_snapshot!(describe(&read));
    }

    #[test]
    fn shapes_and_digests_that_cannot_be_are_refused() {
        for (length, block_size) in [(0, 4096), (4097, 4096), (1 << 20, 5000), (1 << 62, 4096)] {
            let shape = common::Geometry { length, block_size };
            assert!(geometry(Some(&shape)).is_err(), "{shape:?}");
        }
        assert!(geometry(None).is_err());
        assert!(digest(&[0; 15]).is_err());
    }
}
