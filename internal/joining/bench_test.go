package joining

import (
	"crypto/x509"
	"testing"
)

// BenchmarkSlowProof is what a guess at a fixed secret costs, and an agent that joins with one.
func BenchmarkSlowProof(b *testing.B) {
	for b.Loop() {
		SlowProof("a secret of sixteen characters", &x509.Certificate{Raw: []byte("x")})
	}
}
