//! SHA-1 and SHA-256 of octets that lie in memory, for the hot path of replay: three digests of some hundred octets an
//! entry, where what a general hasher does beside compressing (buffering, finishing, wiping) costs as much as a block.
//! The compression functions are the libraries'; the padding is FIPS 180-4 §5.1.1.

use sha1::block_api::compress;
use sha2::block_api::compress256;

/// FIPS 180-4 §6.1.
#[inline]
pub(super) fn sha1(octets: &[u8]) -> [u8; 20] {
    let mut state: [u32; 5] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476, 0xc3d2_e1f0];
    for_each_block(octets, |blocks| compress(&mut state, blocks));
    let mut digest = [0; 20];
    write_words(&state, &mut digest);
    digest
}

/// FIPS 180-4 §6.2.
#[inline]
pub(super) fn sha256(octets: &[u8]) -> [u8; 32] {
    let mut state: [u32; 8] =
        [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];
    for_each_block(octets, |blocks| compress256(&mut state, blocks));
    let mut digest = [0; 32];
    write_words(&state, &mut digest);
    digest
}

/// The message in blocks of 64 octets, with its padding: a one, zeros, and the length in bits.
#[inline]
fn for_each_block(octets: &[u8], mut compress: impl FnMut(&[[u8; BLOCK]])) {
    let (whole, rest) = octets.as_chunks::<BLOCK>();
    if !whole.is_empty() {
        compress(whole);
    }
    let mut last = [[0; BLOCK]; 2];
    let flat = last.as_flattened_mut();
    flat[..rest.len()].copy_from_slice(rest);
    flat[rest.len()] = 0x80;
    let blocks = if rest.len() < BLOCK - LENGTH { 1 } else { 2 };
    let bits = (octets.len() as u64) << 3;
    flat[blocks * BLOCK - LENGTH..blocks * BLOCK].copy_from_slice(&bits.to_be_bytes());
    compress(&last[..blocks]);
}

#[inline]
fn write_words(words: &[u32], octets: &mut [u8]) {
    for (word, four) in words.iter().zip(octets.as_chunks_mut::<4>().0) {
        *four = word.to_be_bytes();
    }
}

const BLOCK: usize = 64;
/// Octets of the length at the end.
const LENGTH: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;
    use openssl::hash::{MessageDigest, hash};
    use proptest::prelude::*;

    fn are_as_openssl_has_them(octets: &[u8]) {
        assert_eq!(sha1(octets)[..], hash(MessageDigest::sha1(), octets).unwrap()[..], "SHA-1 of {}", octets.len());
        assert_eq!(
            sha256(octets)[..],
            hash(MessageDigest::sha256(), octets).unwrap()[..],
            "SHA-256 of {}",
            octets.len()
        );
    }

    #[test]
    fn messages_of_every_length_about_a_block_are_padded_right() {
        let octets: Vec<u8> = (0..=255).cycle().take(300).collect();
        for length in 0..=octets.len() {
            are_as_openssl_has_them(&octets[..length]);
        }
    }

    proptest! {
        #[test]
        fn digests_are_the_librarys(octets in prop::collection::vec(any::<u8>(), 0..5000)) {
            are_as_openssl_has_them(&octets);
        }
    }
}
