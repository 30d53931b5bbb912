//! `mlx-bindgen <mlx-c folder> <bindings.rs>`: the bindings that mlx-sys's build script would have
//! generated, made with that script's own settings (setup.sh names the crate in `MLX_SYS_DIR`).
//!
//! One thing is added. mlx-c declares its half-precision accessors on aarch64 only, mlx-rs uses them
//! everywhere: on other machines they are declared here and defined in `linux_compat.cpp`.

use std::error::Error;
use std::path::Path;

#[allow(dead_code)]
mod bindgen_config {
    include!(concat!(env!("MLX_SYS_DIR"), "/src/bindgen_config.rs"));
}

/// What bindgen makes of `array.h` on aarch64.
const HALF_ACCESSORS: &str = r#"
#[repr(transparent)]
#[derive(Debug, Default, Copy, Clone, PartialEq)]
pub struct __BindgenFloat16(pub u16);
pub type float16_t = __BindgenFloat16;
pub type bfloat16_t = u16;
unsafe extern "C" {
    pub fn mlx_array_item_float16(res: *mut float16_t, arr: mlx_array) -> ::std::os::raw::c_int;
    pub fn mlx_array_item_bfloat16(res: *mut bfloat16_t, arr: mlx_array) -> ::std::os::raw::c_int;
    pub fn mlx_array_data_float16(arr: mlx_array) -> *const float16_t;
    pub fn mlx_array_data_bfloat16(arr: mlx_array) -> *const bfloat16_t;
}
"#;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(mlx_c), Some(out)) = (args.next(), args.next()) else {
        return Err("usage: mlx-bindgen <mlx-c folder> <bindings.rs>".into());
    };
    let mlx_c = Path::new(&mlx_c);
    let headers = bindgen_config::discover_headers(mlx_c)?;
    let mut builder = bindgen_config::builder(mlx_c, &headers);
    if cfg!(not(target_arch = "aarch64")) {
        builder = builder.raw_line(HALF_ACCESSORS);
    }
    builder.generate()?.write_to_file(out)?;
    Ok(())
}
