//! The `vault-svc` program.

fn main() {}
