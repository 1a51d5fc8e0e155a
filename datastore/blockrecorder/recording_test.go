package blockrecorder

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// recorded is a disk of four blocks that was written to: 1 before the first flush, 2 and 3 before the second, 4 after it.
func recorded() (r Recording) {
	content := bytes.Repeat([]byte{9}, 4*blockSize)
	clear(content[blockSize:]) // zero blocks are not stored
	r.first = newImage(content)
	r.write(0, bytes.Repeat([]byte{1}, blockSize))
	r.flush()
	r.write(0, bytes.Repeat([]byte{2}, 2*blockSize))
	r.write(blockSize+sectorSize, bytes.Repeat([]byte{3}, sectorSize)) // over a part of it
	r.flush()
	r.write(2*blockSize, bytes.Repeat([]byte{4}, blockSize))
	return r
}

// sectorsOf returns the first byte of each sector, which all bytes of it must have.
func sectorsOf(t *testing.T, content []byte) (out []byte) {
	t.Helper()
	for at := 0; at < len(content); at += sectorSize {
		sector := content[at : at+sectorSize]
		if !bytes.Equal(sector, bytes.Repeat(sector[:1], sectorSize)) {
			t.Fatalf("the sector at %d is torn", at)
		}
		out = append(out, sector[0])
	}
	return out
}

func TestDroppedTail(t *testing.T) {
	r := recorded()
	block := func(b byte) []byte { return bytes.Repeat([]byte{b}, blockSize/sectorSize) }
	second := append([]byte{2, 3}, bytes.Repeat([]byte{2}, blockSize/sectorSize-2)...)
	for flushes, want := range [][]byte{
		bytes.Join([][]byte{block(9), block(0), block(0), block(0)}, nil),
		bytes.Join([][]byte{block(1), block(0), block(0), block(0)}, nil),
		bytes.Join([][]byte{block(2), second, block(0), block(0)}, nil),
	} {
		image := r.Image(flushes, Dropped, nil)
		if got := sectorsOf(t, image.Content()); !bytes.Equal(got, want) {
			t.Errorf("after %d flushes: %v, want %v", flushes, got, want)
		}
		path := filepath.Join(t.TempDir(), "image")
		if err := image.WriteFile(path); err != nil {
			t.Fatal(err)
		}
		if data, err := os.ReadFile(path); err != nil || !bytes.Equal(data, image.Content()) {
			t.Errorf("after %d flushes: the file differs from the content: %v", flushes, err)
		}
	}
}

// TestOpenTails: every sector is what it was, or what one of the open writes has made of it; and all mixtures come.
func TestOpenTails(t *testing.T) {
	r := recorded()
	random := rand.New(rand.NewPCG(1, 2))
	states := map[Tail]map[string]bool{Prefix: {}, Sectors: {}}
	for tail, seen := range states {
		for range 300 {
			got := sectorsOf(t, r.Image(1, tail, random).Content())
			seen[string(got)] = true
			beyond := false // a prefix has nothing after what it lacks
			for i, b := range got {
				old, written := byte(0), []byte{2}
				switch {
				case i < blockSize/sectorSize:
					old = 1
				case i == blockSize/sectorSize+1:
					written = []byte{2, 3}
				case i >= 2*blockSize/sectorSize:
					written = nil
				}
				if b != old && !bytes.Contains(written, []byte{b}) {
					t.Fatalf("%s: sector %d is %d", tail, i, b)
				}
				if tail == Prefix && written != nil {
					if b != old && beyond {
						t.Fatalf("prefix: %v", got)
					}
					beyond = beyond || b == old
				}
			}
		}
	}
	if p, s := len(states[Prefix]), len(states[Sectors]); p < 10 || s < 200 {
		t.Errorf("300 cuts have left %d different prefixes and %d different mixtures", p, s)
	}
	if got := sectorsOf(t, r.Image(2, Sectors, random).Content()); got[0] != 2 {
		t.Errorf("what was flushed is gone: %v", got)
	}
}
