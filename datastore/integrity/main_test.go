package integrity

import (
	"testing"

	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	wal.SegmentSizeBytes = segment
	goleak.VerifyTestMain(m)
}
