//! The repository as a whole, over stores that behave and stores that do not.

mod model;
mod support;
