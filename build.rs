//! How the program is linked: a position-independent program of this size has forty thousand relocations, and the packed form of
//! their table is a thirtieth of the plain one, on disk and, as it is read whole at start, in memory. Needs glibc 2.36.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
}
