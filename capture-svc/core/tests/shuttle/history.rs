//! What the volume went through, as its clients saw it, and what an image of a cut may be according to that.
//!
//! The rule is `the_image_of_a_cut_has_every_request_that_ended_before_the_flip_and_none_that_entered_after`. Nobody
//! outside sees the flip itself, but it lies between the begin and the end of the call that flips. So an image is right
//! if there is one instant in between such that each block, by itself, has the content that some number of its writes
//! left, in the order in which they were made, with those of every request that had ended by that instant, and none of
//! a request that had not begun. One instant for all blocks: what a client wrote after it had heard that another write
//! was done is never there without that one.

use crate::{
    BLOCKS,
    chunks::{Block, CHUNKS, Image, Tag, index},
};

/// A point in a schedule. Later points are greater.
pub(crate) type Time = u64;

/// A request, by the order in which they began.
pub(crate) type Number = usize;

/// What a request writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Data,
    Zeroes,
    Trim,
}

#[derive(Debug, Clone)]
struct Request {
    kind: Kind,
    /// Chunks of the volume.
    first: u64,
    end: u64,
    begun: Time,
    /// The epoch that the engine gave it.
    epoch: Option<u64>,
    ended: Option<Time>,
}

#[derive(Debug, Clone)]
struct Version {
    request: Number,
    content: Block,
}

/// A cut, as its caller saw it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flip {
    pub(crate) epoch: u64,
    /// Before it was asked for.
    pub(crate) from: Time,
    /// When it had been done.
    pub(crate) to: Time,
}

/// All requests, and what they did to each block, in order.
#[derive(Debug, Clone, Default)]
pub(crate) struct History {
    now: Time,
    requests: Vec<Request>,
    initial: Image,
    versions: Vec<Vec<Version>>,
}

impl History {
    /// Of a volume of zeroes.
    pub(crate) fn new() -> Self {
        Self::after(vec![[0; CHUNKS]; index(BLOCKS)])
    }

    /// Of a volume with this content.
    pub(crate) fn after(initial: Image) -> Self {
        Self {
            versions: initial.iter().map(|_| Vec::new()).collect(),
            initial,
            ..Self::default()
        }
    }

    /// A new point in time.
    pub(crate) fn tick(&mut self) -> Time {
        self.now += 1;
        self.now
    }

    pub(crate) fn begin(&mut self, kind: Kind, first: u64, end: u64) -> Number {
        let begun = self.tick();
        self.requests.push(Request {
            kind,
            first,
            end,
            begun,
            epoch: None,
            ended: None,
        });
        self.requests.len() - 1
    }

    pub(crate) fn entered(&mut self, number: Number, epoch: u64) {
        self.requests[number].epoch = Some(epoch);
    }

    /// The request has ended well.
    pub(crate) fn ended(&mut self, number: Number) {
        self.requests[number].ended = Some(self.tick());
    }

    /// What the request fills its chunks with.
    pub(crate) fn tag(&self, number: Number) -> Tag {
        match self.requests[number].kind {
            Kind::Data => number as Tag + 1,
            Kind::Zeroes | Kind::Trim => 0,
        }
    }

    /// The request is about to write its part of a block, which it has locked.
    pub(crate) fn write(&mut self, number: Number, block: u64) {
        let Request { first, end, .. } = self.requests[number];
        let start = block * CHUNKS as u64;
        let mut content = self.last(block);
        for (chunk, tag) in (start..).zip(&mut content) {
            if (first..end).contains(&chunk) {
                *tag = self.tag(number);
            }
        }
        self.versions[index(block)].push(Version {
            request: number,
            content,
        });
    }

    /// The content after all writes so far.
    pub(crate) fn last(&self, block: u64) -> Block {
        let version = self.versions[index(block)].last();
        version.map_or(self.initial[index(block)], |version| version.content)
    }

    /// What the volume must hold once nobody writes.
    pub(crate) fn content(&self) -> Image {
        (0..BLOCKS).map(|block| self.last(block)).collect()
    }

    /// How many writes each block has had of requests that have ended, and those before them.
    pub(crate) fn ended_writes(&self) -> Vec<usize> {
        let of_block = |versions: &Vec<Version>| {
            let ended = |version: &Version| self.requests[version.request].ended.is_some();
            versions.iter().rposition(ended).map_or(0, |last| last + 1)
        };
        self.versions.iter().map(of_block).collect()
    }

    /// Whether each chunk has what one of its writes left, none before the first `counts` of its block.
    pub(crate) fn assert_at_least(&self, counts: &[usize], image: &Image) {
        for (block, (&count, found)) in counts.iter().zip(image).enumerate() {
            for (chunk, tag) in found.iter().enumerate() {
                let contents = std::iter::once(&self.initial[block])
                    .chain(self.versions[block].iter().map(|version| &version.content));
                assert!(
                    contents.skip(count).any(|content| content[chunk] == *tag),
                    "chunk {chunk} of block {block} is older than a write that a sync followed: {found:?}"
                );
            }
        }
    }

    /// # Panics
    /// Where it isn't an image of the cut.
    pub(crate) fn assert_image(&self, flip: Flip, image: &Image) {
        let possible = (flip.from..=flip.to).any(|instant| {
            let blocks = self.versions.iter().enumerate().zip(image);
            blocks.into_iter().all(|((block, versions), found)| {
                self.agrees(flip, instant, block, versions, found)
            })
        });
        assert!(
            possible,
            "not the image of a flip between {} and {}, at the end of epoch {}: {image:?}\n{self:#?}",
            flip.from, flip.to, flip.epoch
        );
    }

    fn agrees(
        &self,
        flip: Flip,
        instant: Time,
        block: usize,
        versions: &[Version],
        found: &Block,
    ) -> bool {
        let may_be_in = |version: &Version| {
            let request = &self.requests[version.request];
            request.begun <= instant && request.epoch.is_some_and(|epoch| epoch <= flip.epoch)
        };
        let may_be_out = |version: &Version| {
            let request = &self.requests[version.request];
            request.ended.is_none_or(|ended| ended > instant)
        };
        (0..=versions.len()).any(|count| {
            let content = match count {
                0 => &self.initial[block],
                _ => &versions[count - 1].content,
            };
            let (inside, outside) = versions.split_at(count);
            content == found && inside.iter().all(may_be_in) && outside.iter().all(may_be_out)
        })
    }
}
