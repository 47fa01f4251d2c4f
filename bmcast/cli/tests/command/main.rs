//! The command `bmcast`, as its users and machines meet it.

mod client;
mod command;
mod machine;
mod media;
mod serve;
