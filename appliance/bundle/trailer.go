package bundle

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
)

// trailer is the end of a bundle. It has a fixed size, so that it can be found.
type trailer struct {
	index, signature int64 // sizes; the signature follows the index, and the trailer the signature
	sum              [sha256.Size]byte
}

// magic is the end of the trailer, and of the file.
const magic = "kedgebundle\x00\x00\x00\x00\x01"

const trailerSize = 8 + 8 + sha256.Size + len(magic)

func (t trailer) bytes() []byte {
	out := binary.BigEndian.AppendUint64(nil, uint64(t.index))
	out = binary.BigEndian.AppendUint64(out, uint64(t.signature))
	out = append(out, t.sum[:]...)
	return append(out, magic...)
}

// errNoTrailer means that a file does not end with a trailer.
var errNoTrailer = errors.New("it does not end as a bundle does")

// parseTrailer reads the last bytes of a file with a size.
func parseTrailer(data []byte, fileSize int64) (t trailer, err error) {
	if len(data) != trailerSize || string(data[trailerSize-len(magic):]) != magic {
		return t, errNoTrailer
	}
	index, signature := binary.BigEndian.Uint64(data), binary.BigEndian.Uint64(data[8:])
	if index > maxIndex || signature > maxSignature || int64(index+signature)+int64(trailerSize) > fileSize {
		return t, errors.New("the size of its index cannot be right")
	}
	t.index, t.signature = int64(index), int64(signature)
	copy(t.sum[:], data[16:])
	return t, nil
}
