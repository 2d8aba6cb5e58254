//! The Tidemark protocol: generated gRPC code and its conversions to domain types.
