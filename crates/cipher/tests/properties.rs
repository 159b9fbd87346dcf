//! What has to hold for any key, DUN, data unit size and data.

use inlinecrypt_cipher::wrap::{OVERHEAD_BYTES, Unauthentic, WrappingKey, unwrap, wrap};
use inlinecrypt_cipher::{Dun, MODES, Mode, SectorUpdate, UnitCipher, beneath};
use proptest::prelude::*;

/// A key that no mode refuses, different for each seed.
fn key(mode: Mode, seed: u64) -> Vec<u8> {
    fill(seed ^ 0x6b65_7921, mode.info().key_bytes)
}

/// Bytes without a pattern (xorshift64*; any generator would do).
fn fill(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let words = std::iter::repeat_with(|| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()
    });
    words.flatten().take(len).collect()
}

fn cipher(mode: Mode, seed: u64) -> Box<dyn UnitCipher> {
    mode.info().expand(&key(mode, seed)).unwrap()
}

fn modes() -> impl Strategy<Value = Mode> {
    prop::sample::select(&Mode::ALL[..])
}

/// DUNs near every limb boundary, and anywhere.
fn duns() -> impl Strategy<Value = Dun> {
    let limb = prop_oneof![Just(0), Just(u64::MAX), u64::MAX - 40..=u64::MAX, any::<u64>()];
    prop::array::uniform4(limb).prop_map(Dun::from_limbs)
}

/// `bytes` plus `units`, a byte at a time; whether a carry is left.
fn add_slowly(mut bytes: [u8; 32], units: u64) -> ([u8; 32], bool) {
    let mut rest = u128::from(units);
    for byte in &mut bytes {
        let sum = u128::from(*byte) + rest;
        *byte = u8::try_from(sum & 0xff).unwrap();
        rest = sum >> 8;
    }
    (bytes, rest != 0)
}

proptest! {
    #[test]
    fn duns_add_like_long_numbers(dun in duns(), units in prop_oneof![0..100_u64, any::<u64>()]) {
        let (bytes, carry) = add_slowly(dun.to_le_bytes(), units);
        let (sum, overflow) = dun.overflowing_add(units);
        prop_assert_eq!(sum.to_le_bytes(), bytes);
        prop_assert_eq!(overflow, carry);
        prop_assert_eq!(dun.wrapping_add(units), sum);
        prop_assert_eq!(dun.is_followed_by(units, sum), !carry);
        prop_assert!(!dun.is_followed_by(units, sum.wrapping_add(1)));
        let significant = usize::from(dun.significant_bytes());
        prop_assert!(dun.to_le_bytes()[significant..].iter().all(|&b| b == 0));
        prop_assert!(significant == 0 || dun.to_le_bytes()[significant - 1] != 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn one_call_for_many_units_equals_one_call_for_each(
        mode in modes(), dun in duns(), log2 in 9..=16_u32, seed in any::<u64>(), units in 1..=80_usize,
    ) {
        let unit_bytes = 1 << log2;
        // Many units are the point where they are small; a megabyte is enough.
        let units = units.min((1 << 20) >> log2).max(1);
        let cipher = cipher(mode, seed);
        let plain = fill(seed, units * unit_bytes);

        let (mut together, mut apart) = (plain.clone(), plain.clone());
        cipher.encrypt(dun, unit_bytes, &mut together);
        for (step, unit) in (0..).zip(apart.chunks_exact_mut(unit_bytes)) {
            cipher.encrypt(dun.wrapping_add(step), unit_bytes, unit);
        }
        prop_assert!(together == apart);

        cipher.decrypt(dun, unit_bytes, &mut together);
        prop_assert!(together == plain);
        for (step, unit) in (0..).zip(apart.chunks_exact_mut(unit_bytes)) {
            cipher.decrypt(dun.wrapping_add(step), unit_bytes, unit);
        }
        prop_assert!(apart == plain);
    }

    /// In every way that this CPU has: all kernels, and the library.
    #[test]
    fn xts_equals_the_oracle(
        mode in prop::sample::select(vec![Mode::Aes256Xts, Mode::Sm4Xts, Mode::Aes128Xts]), dun in duns(),
        log2 in 4..=16_u32, seed in any::<u64>(), units in 1..=5_usize,
    ) {
        let unit_bytes = 1 << log2;
        let key = key(mode, seed);
        let plain = fill(seed, units * unit_bytes);
        let mut expected = plain.clone();
        for (step, unit) in (0..).zip(expected.chunks_exact_mut(unit_bytes)) {
            let tweak: [u8; 16] = dun.wrapping_add(step).to_le_bytes()[..16].try_into().unwrap();
            oracle(mode, &key, unit, tweak);
        }
        for (way, expand) in beneath::ways(mode) {
            let cipher = expand(&key);
            let mut data = plain.clone();
            cipher.encrypt(dun, unit_bytes, &mut data);
            prop_assert!(data == expected, "{}", way);
            cipher.decrypt(dun, unit_bytes, &mut data);
            prop_assert!(data == plain, "{}", way);
        }
    }

    #[test]
    fn wrapped_keys_come_back_and_no_changed_bit_is_missed(
        key in prop::collection::vec(any::<u8>(), 0..=64), seed in any::<u64>(), flip in any::<prop::sample::Index>(),
    ) {
        let kek = WrappingKey::derive(&fill(seed, 32).try_into().unwrap(), b"test");
        let associated: [&[u8]; 2] = [b"AES-256-XTS", b"disk"];
        let wrapped = wrap(&kek, &associated, &key);
        prop_assert_eq!(wrapped.len(), key.len() + OVERHEAD_BYTES);
        prop_assert_eq!(&wrapped, &wrap(&kek, &associated, &key));
        prop_assert_eq!(&**unwrap(&kek, &associated, &wrapped).unwrap(), &key[..]);

        let bit = flip.index(wrapped.len() * 8);
        let mut changed = wrapped.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        prop_assert_eq!(unwrap(&kek, &associated, &changed), Err(Unauthentic));
        let other = WrappingKey::derive(&fill(seed, 32).try_into().unwrap(), b"text");
        prop_assert_eq!(unwrap(&other, &associated, &wrapped), Err(Unauthentic));
    }
}

/// XTS by somebody else, one block at a time.
fn oracle(mode: Mode, key: &[u8], unit: &mut [u8], tweak: [u8; 16]) {
    use aes::cipher::KeyInit;
    let (data, tweaks) = key.split_at(key.len() / 2);
    match mode {
        Mode::Aes256Xts => xts_mode::Xts128::new(
            aes::Aes256::new_from_slice(data).unwrap(),
            aes::Aes256::new_from_slice(tweaks).unwrap(),
        )
        .encrypt_sector(unit, tweak.into()),
        Mode::Sm4Xts => xts_mode::Xts128::new(
            sm4::Sm4::new_from_slice(data).unwrap(),
            sm4::Sm4::new_from_slice(tweaks).unwrap(),
        )
        .encrypt_sector(unit, tweak.into()),
        Mode::Aes128Xts => xts_mode::Xts128::new(
            aes::Aes128::new_from_slice(data).unwrap(),
            aes::Aes128::new_from_slice(tweaks).unwrap(),
        )
        .encrypt_sector(unit, tweak.into()),
        other => panic!("{other} is not XTS"),
    }
}

#[test]
fn every_flipped_bit_of_a_wrapped_key_or_its_associated_data_is_refused() {
    let kek = WrappingKey::new(&fill(1, 64).try_into().unwrap());
    let key = fill(2, 32);
    let associated = fill(3, 20);
    let wrapped = wrap(&kek, &[&associated], &key);
    for bit in 0..wrapped.len() * 8 {
        let mut changed = wrapped.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(unwrap(&kek, &[&associated], &changed), Err(Unauthentic), "bit {bit} of the wrapped key");
    }
    for bit in 0..associated.len() * 8 {
        let mut changed = associated.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(unwrap(&kek, &[&changed], &wrapped), Err(Unauthentic), "bit {bit} of the associated data");
    }
    for len in 0..wrapped.len() {
        assert_eq!(unwrap(&kek, &[&associated], &wrapped[..len]), Err(Unauthentic), "cut to {len} bytes");
    }
    // A vector, not a concatenation.
    let (start, end) = associated.split_at(7);
    assert_eq!(unwrap(&kek, &[start, end], &wrapped), Err(Unauthentic));
    assert_eq!(unwrap(&kek, &[], &wrapped), Err(Unauthentic));
}

#[test]
fn a_wrapping_key_shows_nothing_of_itself() {
    assert_eq!(format!("{:?}", WrappingKey::new(&[0xab; 64])), "WrappingKey(64 bytes)");
}

#[test]
fn threads_that_share_a_cipher_do_not_disturb_each_other() {
    // More threads than the library has contexts for one key and direction, so that some have to wait.
    const THREADS: u64 = 24;
    let ways =
        Mode::ALL.into_iter().flat_map(|mode| beneath::ways(mode).into_iter().map(move |way| (mode, way)));
    for (mode, (way, expand)) in ways {
        let key = key(mode, 7);
        let (shared, alone) = (expand(&key), expand(&key));
        let requests: Vec<_> = (0..THREADS * 10)
            .map(|request| {
                let dun = Dun::from_limbs([u64::MAX - request, request, 7, 1]);
                let plain = fill(request, 8 * 512);
                let mut expected = plain.clone();
                alone.encrypt(dun, 512, &mut expected);
                (dun, plain, expected)
            })
            .collect();
        std::thread::scope(|scope| {
            for requests in requests.chunks(10) {
                let shared = &*shared;
                scope.spawn(move || {
                    for (dun, plain, expected) in requests {
                        let mut data = plain.clone();
                        shared.encrypt(*dun, 512, &mut data);
                        assert!(data == *expected, "{mode} {way}");
                        shared.decrypt(*dun, 512, &mut data);
                        assert!(data == *plain, "{mode} {way}");
                    }
                });
            }
        });
    }
}

#[test]
fn the_dun_reaches_the_cipher_as_far_as_the_iv_does() {
    for info in &MODES {
        let cipher = cipher(info.mode, 3);
        let encrypted = |limbs| {
            let mut data = vec![0; 512];
            cipher.encrypt(Dun::from_limbs(limbs), 512, &mut data);
            data
        };
        let base = encrypted([1, 2, 3, 4]);
        for limb in 0..4 {
            let mut limbs = [1, 2, 3, 4];
            limbs[limb] ^= 1 << 63;
            let reaches = limb < usize::from(info.iv_bytes) / 8;
            assert_eq!(encrypted(limbs) != base, reaches, "{}: limb {limb}", info.name);
        }
    }
}

#[test]
fn a_changed_sector_changes_what_the_table_says() {
    for info in &MODES {
        let cipher = cipher(info.mode, 5);
        let mut before = vec![0; 4096];
        cipher.encrypt(Dun::from(9), 4096, &mut before);
        let mut after = vec![0; 4096];
        after[3 * 512] = 1;
        cipher.encrypt(Dun::from(9), 4096, &mut after);
        let changed: Vec<bool> = before.chunks(512).zip(after.chunks(512)).map(|(a, b)| a != b).collect();
        let expected: Vec<bool> = (0..8)
            .map(|sector| match info.sector_update {
                SectorUpdate::Local => sector == 3,
                SectorUpdate::Chained => sector >= 3,
                SectorUpdate::Wide => true,
            })
            .collect();
        assert_eq!(changed, expected, "{}", info.name);
    }
}

#[test]
fn broken_promises_panic_and_nothing_is_no_units() {
    for mode in Mode::ALL {
        let cipher = cipher(mode, 1);
        cipher.encrypt(Dun::ZERO, 512, &mut []);
        cipher.decrypt(Dun::ZERO, 512, &mut []);
        for (unit_bytes, len) in [(0, 0), (8, 16), (48, 48), (512, 513), (512, 256), (1 << 25, 0)] {
            for encrypt in [true, false] {
                let broken = std::panic::AssertUnwindSafe(|| {
                    let mut data = vec![0; len];
                    if encrypt {
                        cipher.encrypt(Dun::ZERO, unit_bytes, &mut data);
                    } else {
                        cipher.decrypt(Dun::ZERO, unit_bytes, &mut data);
                    }
                });
                assert!(std::panic::catch_unwind(broken).is_err(), "{mode}: {unit_bytes}, {len}");
            }
        }
        // It is as good as before.
        let mut data = vec![7; 512];
        cipher.encrypt(Dun::ZERO, 512, &mut data);
        cipher.decrypt(Dun::ZERO, 512, &mut data);
        assert_eq!(data, [7; 512]);
    }
}

#[test]
fn the_largest_data_unit_works() {
    for info in &MODES {
        let cipher = cipher(info.mode, 2);
        let unit_bytes = usize::try_from(info.unit_bytes_max).unwrap();
        let plain = fill(2, unit_bytes);
        let mut data = plain.clone();
        cipher.encrypt(Dun::from(1), unit_bytes, &mut data);
        assert!(data != plain);
        cipher.decrypt(Dun::from(1), unit_bytes, &mut data);
        assert!(data == plain, "{}", info.name);
    }
}
