package joining

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"testing"
)

func TestLooksRandom(t *testing.T) {
	raw := make([]byte, 33)
	for range 200 {
		rand.Read(raw)
		if s := hex.EncodeToString(raw[:20]); !LooksRandom(Secret(s)) {
			t.Errorf("20 random bytes in hex do not look random: %s", s)
		}
	}
	random := 0
	for range 200 {
		rand.Read(raw)
		if LooksRandom(Secret(base64.StdEncoding.EncodeToString(raw))) {
			random++
		}
	}
	if random < 190 {
		t.Errorf("of 200 secrets of 33 random bytes in base64 only %d look random", random)
	}
	for _, s := range []Secret{
		"", "0123456789abcdef", "correct-horse-battery-staple-again-and-again", "Correct-Horse-Battery-Staple-Again-And",
		"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "my-home-cluster-secret-2026-11-28-please", "00000000000000000000000000000000000001",
	} {
		if LooksRandom(s) {
			t.Errorf("%q looks random", string(s))
		}
	}
}
