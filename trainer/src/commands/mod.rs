//! What each command does, from arguments to files: one file a command.

mod calibrate;
mod compare;
mod evaluate;
mod export;
mod init;
mod logits;
mod shared;
mod specialise;
mod speed;
mod train;

pub use calibrate::calibrate;
pub use compare::compare;
pub use evaluate::evaluate;
pub use export::export;
pub use init::init;
pub use logits::logits;
pub use specialise::specialise;
pub use speed::speed;
pub use train::train;
