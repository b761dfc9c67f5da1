//! How the programs are linked.

fn main() {
    // The loader reads every relocation at the start. Packed (glibc 2.36), they are 10 kB instead of 600, which would stay in
    // memory. A linker that does not know the option says so and goes on.
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    println!("cargo::rerun-if-changed=build.rs");
}
