// Command payload compresses the programs that are embedded in the executable, and writes the manifest with
// their hashes. scripts/build-payload.sh calls it; it is not part of the product.
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/zstd"
)

// entry is an entry of the manifest, which package runtime reads.
type entry struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: payload OUT-DIR PROGRAM...")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "payload:", err)
		os.Exit(1)
	}
}

func run(out string, programs []string) error {
	// The window is limited, because a node needs memory for it when it unpacks.
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithWindowSize(2<<20))
	if err != nil {
		return err
	}
	defer enc.Close()

	var manifest []entry
	for _, path := range programs {
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name := filepath.Base(path)
		sum := sha256.Sum256(data)
		packed := enc.EncodeAll(data, nil)
		if err := os.WriteFile(filepath.Join(out, name+".zst"), packed, 0o644); err != nil {
			return err
		}
		manifest = append(manifest, entry{Name: name, Size: int64(len(data)), SHA256: hex.EncodeToString(sum[:])})
		fmt.Printf("%s: %d bytes, %d compressed\n", name, len(data), len(packed))
	}
	text, err := json.MarshalIndent(manifest, "", "  ")
	if err != nil {
		return err
	}
	// The manifest is compressed too, so that one ignore rule covers all built files.
	return os.WriteFile(filepath.Join(out, "manifest.json.zst"), enc.EncodeAll(text, nil), 0o644)
}
