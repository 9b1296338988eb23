//! The binary `nibble`.

fn main() {}
