//! What is loaded of snapshots after any end, any damage, and under any limit: the tokens that were wanted,
//! or nothing.

mod crash;
mod damage;
mod gone;
mod limits;
mod sharing;
mod world;
