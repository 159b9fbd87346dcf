//! Lines of dm tables, as people and dmsetup write them, and the ciphers in them.
#![no_main]

use inlinecrypt_core::dm::{CipherSpec, Table};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(spec) = CipherSpec::parse(text) {
        assert_eq!(CipherSpec::parse(&spec.to_string()), Ok(spec));
    }
    line(text);
    // Further in at once: key, numbers, device and options.
    line(&format!("0 4096 crypt aes-xts-plain64 {text}"));
    line(&format!("0 4096 inlinecrypt aes-xts-plain64 - 0 d 0 {text}"));
});

fn line(text: &str) {
    match Table::parse(text) {
        Ok(table) => {
            // A line feed behind a backslash is part of no name that the line could be printed with.
            if !table.device.contains('\n') {
                assert_eq!(Table::parse(&table.with_key()).expect("what is printed is a line"), table);
            }
            let _ = table.iv_fits();
            let _ = format!("{table:?}");
        }
        Err(error) => {
            assert!(text.get(error.at.clone()).is_some(), "{error} points outside");
            let said = error.to_string();
            // Nothing as long as a key is repeated. What is shown of 31 digits may have that of an escaped NUL before it.
            let digits = said.split(|c: char| !c.is_ascii_hexdigit()).map(str::len).max();
            assert!(digits.unwrap_or(0) <= 32, "{said}");
        }
    }
}
