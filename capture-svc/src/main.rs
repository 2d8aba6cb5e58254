//! The `capture-svc` program.

fn main() {}
