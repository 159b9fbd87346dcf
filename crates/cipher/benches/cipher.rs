//! How fast the modes are, and how near AES-256-XTS comes to the AWS-LC calls beneath it.
//!
//! One thread, in place, a buffer of 256 KiB that stays in cache. Run with `cargo bench -p inlinecrypt-cipher`; compare
//! ratios within one run, as machines differ and are shared.

use criterion::{
    BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use inlinecrypt_cipher::{Dun, MODES, Mode, ModeInfo, beneath};
use std::hint::black_box;
use std::time::Duration;

const BUFFER_BYTES: usize = 256 * 1024;
const UNIT_BYTES: [usize; 3] = [512, 4096, 65_536];

fn key(info: &ModeInfo) -> Vec<u8> {
    (0..=255).cycle().take(info.key_bytes).collect()
}

fn group<'c>(criterion: &'c mut Criterion, name: &str) -> BenchmarkGroup<'c, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1)).sample_size(20);
    group
}

/// Transforms one data unit, given its IV.
type Bare = Box<dyn FnMut(&[u8; 16], &mut [u8])>;

/// The same work through our interface and through AWS-LC's.
fn beside_aws_lc(criterion: &mut Criterion) {
    let info = Mode::Aes256Xts.info();
    let cipher = info.expand(&key(info)).unwrap();
    let mut data = vec![0; BUFFER_BYTES];
    for unit_bytes in UNIT_BYTES {
        let mut bare: [(&str, Bare); 2] = [
            ("encrypt", Box::new(beneath::aes_256_xts_encryptor(&key(info)))),
            ("decrypt", Box::new(beneath::aes_256_xts_decryptor(&key(info)))),
        ];
        for (way, bare) in &mut bare {
            let mut group = group(criterion, &format!("{}/{way}/{unit_bytes}", info.name));
            group.throughput(Throughput::Bytes(BUFFER_BYTES as u64));
            group.bench_function("inlinecrypt", |b| {
                b.iter(|| match *way {
                    "encrypt" => cipher.encrypt(black_box(Dun::from(1)), unit_bytes, &mut data),
                    _ => cipher.decrypt(black_box(Dun::from(1)), unit_bytes, &mut data),
                });
            });
            group.bench_function("aws-lc", |b| {
                b.iter(|| {
                    for (iv, unit) in (black_box(1)..).zip(data.chunks_exact_mut(unit_bytes)) {
                        bare(&u128::to_le_bytes(iv), unit);
                    }
                });
            });
        }
    }
}

fn other_modes(criterion: &mut Criterion) {
    let mut data = vec![0; BUFFER_BYTES];
    for info in MODES.iter().filter(|info| info.mode != Mode::Aes256Xts) {
        let cipher = info.expand(&key(info)).unwrap();
        for unit_bytes in UNIT_BYTES {
            let mut group = group(criterion, &format!("{}/{unit_bytes}", info.name));
            group.throughput(Throughput::Bytes(BUFFER_BYTES as u64));
            group.bench_function("encrypt", |b| {
                b.iter(|| cipher.encrypt(black_box(Dun::from(1)), unit_bytes, &mut data));
            });
            group.bench_function("decrypt", |b| {
                b.iter(|| cipher.decrypt(black_box(Dun::from(1)), unit_bytes, &mut data));
            });
        }
    }
}

/// What programming a keyslot costs, dropping the key included; and with the first data unit, as schedules may be lazy.
fn key_set_up(criterion: &mut Criterion) {
    for info in &MODES {
        let key = key(info);
        let mut data = vec![0; 512];
        let mut group = group(criterion, &format!("{}/key set-up", info.name));
        group.bench_function("alone", |b| b.iter(|| info.expand(black_box(&key)).unwrap()));
        group.bench_function("and one unit of 512", |b| {
            b.iter(|| info.expand(black_box(&key)).unwrap().encrypt(Dun::ZERO, 512, &mut data));
        });
    }
}

criterion_group!(benches, beside_aws_lc, other_modes, key_set_up);
criterion_main!(benches);
