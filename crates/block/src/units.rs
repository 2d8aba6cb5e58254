//! One type per unit, so that a block index can't be added to a byte offset.

use std::fmt;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(u64);

        impl $name {
            /// Zero.
            pub const ZERO: Self = Self(0);

            /// Wraps a plain number.
            #[must_use]
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// The plain number.
            #[must_use]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The number after this one.
            ///
            /// # Panics
            /// At the end of the 64-bit range, which no count of writes, cuts or blocks reaches.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

unit!(
    /// A block's absolute place within its volume, counted from 0.
    BlockIndex
);
unit!(
    /// A number of blocks.
    BlockCount
);
unit!(
    /// A byte's absolute place within its volume, counted from 0.
    ByteOffset
);
unit!(
    /// The writes between two consecutive cuts of a volume. The first epoch is 1.
    Epoch
);
unit!(
    /// A committed image of a volume at the vault, counted from 1. Zero stands for "none yet": the all-zero image.
    GenerationId
);
unit!(
    /// The fencing number of the source that owns a volume at the vault, counted from 1.
    WriterTerm
);
unit!(
    /// The order of versions of one block inside segments: the newest not above a generation's own is its content.
    Sequence
);

impl BlockIndex {
    /// The block `count` further on.
    #[must_use]
    pub const fn plus(self, count: BlockCount) -> Self {
        Self(self.0 + count.0)
    }

    /// How far this block lies behind `start`, which must not be greater.
    #[must_use]
    pub const fn since(self, start: Self) -> BlockCount {
        BlockCount(self.0 - start.0)
    }
}
