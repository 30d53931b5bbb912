//! The one file that calls mlx-c itself: what mlx-rs 0.33 does not wrap.
#![allow(unsafe_code, reason = "mlx-c is a C interface; mlx-rs has no wrapper for device information")]

use std::ffi::{CStr, CString};
use std::ptr;

/// A fact of a device that MLX reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DeviceFact {
    /// A size in bytes or a count.
    Size(u64),
    /// A name.
    Text(String),
}

/// Looks a fact up for the default device, such as "device_name" or "memory_size"; None where MLX does
/// not know it.
pub(crate) fn device_fact(key: &str) -> Option<DeviceFact> {
    let key = CString::new(key).ok()?;
    // SAFETY: every handle is made by mlx-c, used on this thread only and freed once; `key` outlives the
    // calls; a string result belongs to `info` and is copied before `info` is freed.
    unsafe {
        let mut device = mlx_sys::mlx_device_new();
        mlx_sys::mlx_get_default_device(&raw mut device);
        let mut info = mlx_sys::mlx_device_info_new();
        let fact = if mlx_sys::mlx_device_info_get(&raw mut info, device) == 0 {
            read_fact(info, &key)
        } else {
            None
        };
        mlx_sys::mlx_device_info_free(info);
        mlx_sys::mlx_device_free(device);
        fact
    }
}

/// # Safety
/// `info` must be a live handle.
unsafe fn read_fact(info: mlx_sys::mlx_device_info, key: &CStr) -> Option<DeviceFact> {
    let (mut exists, mut is_text) = (false, false);
    // SAFETY: `info` is live by contract, the out-pointers are to locals, and the text is copied at once.
    unsafe {
        mlx_sys::mlx_device_info_has_key(&raw mut exists, info, key.as_ptr());
        if !exists {
            return None;
        }
        mlx_sys::mlx_device_info_is_string(&raw mut is_text, info, key.as_ptr());
        if is_text {
            let mut text = ptr::null();
            let status = mlx_sys::mlx_device_info_get_string(&raw mut text, info, key.as_ptr());
            let known = status == 0 && !text.is_null();
            return known.then(|| DeviceFact::Text(CStr::from_ptr(text).to_string_lossy().into_owned()));
        }
        let mut size = 0;
        let status = mlx_sys::mlx_device_info_get_size(&raw mut size, info, key.as_ptr());
        (status == 0).then_some(DeviceFact::Size(size as u64))
    }
}

/// The version of MLX, such as "0.32.2".
pub(crate) fn mlx_version() -> String {
    // SAFETY: the string handle is made and freed here, and its data is copied in between.
    unsafe {
        let mut text = mlx_sys::mlx_string_new();
        mlx_sys::mlx_version(&raw mut text);
        let data = mlx_sys::mlx_string_data(text);
        let version =
            if data.is_null() { String::new() } else { CStr::from_ptr(data).to_string_lossy().into_owned() };
        mlx_sys::mlx_string_free(text);
        version
    }
}
