//! Any bytes as the multipart body of `POST /classify`.

#![no_main]

use axum::http::Request;
use fuzz::answer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let request = Request::post("/classify").header("content-type", "multipart/form-data; boundary=edge");
    answer(request, bytes);
});
