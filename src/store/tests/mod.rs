//! What a daemon finds after any end of the one before: by crash, by failing disk, by damage, in order.

mod crash;
mod damage;
mod faults;
mod folder;
mod watched;
mod world;
