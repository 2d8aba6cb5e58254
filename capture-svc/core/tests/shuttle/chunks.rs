//! Bytes that move a chunk at a time, and what they hold.

use shuttle::sync::atomic::{AtomicU64, Ordering::SeqCst};

use crate::BLOCK;

/// Bytes that are copied between two points at which another thread may come.
pub(crate) const CHUNK: usize = 1024;
/// Chunks of a block.
pub(crate) const CHUNKS: usize = BLOCK / CHUNK;

/// What a chunk holds: the number of a request, or 0 for zeroes.
pub(crate) type Tag = u64;

/// The content of a block.
pub(crate) type Block = [Tag; CHUNKS];

/// The content of a volume.
pub(crate) type Image = Vec<Block>;

pub(crate) fn index(number: u64) -> usize {
    usize::try_from(number).unwrap()
}

/// Fills whole chunks with a tag.
pub(crate) fn fill(bytes: &mut [u8], tag: Tag) {
    let (words, rest) = bytes.as_chunks_mut();
    assert!(rest.is_empty());
    words.fill(tag.to_le_bytes());
}

/// What whole chunks hold.
pub(crate) fn tags(bytes: &[u8]) -> impl Iterator<Item = Tag> + '_ {
    bytes.chunks(CHUNK).map(|chunk| {
        let (words, _) = chunk.as_chunks();
        assert!(
            words.iter().all(|word| *word == words[0]),
            "a chunk is torn"
        );
        Tag::from_le_bytes(words[0])
    })
}

/// The value of a word at this point, without letting anybody come before.
#[allow(unsafe_code, reason = "shuttle marks what is no scheduling point")]
pub(crate) fn peek(word: &AtomicU64) -> u64 {
    // SAFETY: nothing is accessed but the value, on the one thread that all of shuttle's threads run on.
    unsafe { word.raw_load() }
}

/// Bytes, as the tags of their chunks.
#[derive(Debug)]
pub(crate) struct Chunks(Vec<AtomicU64>);

impl Chunks {
    pub(crate) fn holding(tags: impl IntoIterator<Item = Tag>) -> Self {
        Self(tags.into_iter().map(AtomicU64::new).collect())
    }

    fn at(&self, offset: u64, length: usize) -> &[AtomicU64] {
        let (first, skew) = (index(offset) / CHUNK, index(offset) % CHUNK);
        assert_eq!((skew, length % CHUNK), (0, 0), "whole chunks");
        &self.0[first..first + length / CHUNK]
    }

    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) {
        let chunks = self.at(offset, bytes.len());
        for (bytes, chunk) in bytes.chunks_mut(CHUNK).zip(chunks) {
            fill(bytes, chunk.load(SeqCst));
        }
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        let chunks = self.at(offset, bytes.len());
        for (tag, chunk) in tags(bytes).zip(chunks) {
            chunk.store(tag, SeqCst);
        }
    }

    /// How many blocks they make.
    pub(crate) const fn blocks(&self) -> u64 {
        (self.0.len() / CHUNKS) as u64
    }

    pub(crate) fn peek(&self) -> Vec<Tag> {
        self.0.iter().map(peek).collect()
    }
}

/// The content of a volume with these chunks.
pub(crate) fn image(tags: &[Tag]) -> Image {
    tags.as_chunks().0.to_vec()
}
