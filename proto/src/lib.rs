//! The Tidemark protocol: code generated from `proto/tidemark/**.proto`, and its conversions to domain types.
//!
//! Protobuf types end at the RPC edge: whatever lies behind it works with the types of `tidemark-block`.

pub mod convert;
pub mod error;

pub use error::{ErrorKind, Reason, RpcError};

/// Types that both services speak.
pub mod common {
    /// `tidemark.common.v1`.
    #[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
    pub mod v1 {
        tonic::include_proto!("tidemark.common.v1");
    }
}

/// The capture service.
pub mod capture {
    /// `tidemark.capture.v1`.
    #[allow(
        missing_docs,
        missing_debug_implementations,
        unreachable_pub,
        clippy::all,
        clippy::pedantic
    )]
    pub mod v1 {
        tonic::include_proto!("tidemark.capture.v1");
    }
}

/// The vault service.
pub mod vault {
    /// `tidemark.vault.v1`.
    #[allow(
        missing_docs,
        missing_debug_implementations,
        unreachable_pub,
        clippy::all,
        clippy::pedantic
    )]
    pub mod v1 {
        tonic::include_proto!("tidemark.vault.v1");
    }
}

/// The compiled descriptors of all packages, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/tidemark.binpb"));
