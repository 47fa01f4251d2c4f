//! The user-space side of Blanket.

pub mod builder;
pub mod kernel;
#[cfg(test)]
mod testkernel;
