//! Helpers that several test programs share.
#![allow(dead_code, reason = "every test program compiles all of this and uses a part")]

pub mod attention;
pub mod engines;
#[cfg(unix)]
pub mod place;
pub mod random_packed;
pub mod rtn;
pub mod tiny_model;
