package srsize

import (
	"time"
)

const (
	sampleEvery = 10 * time.Minute
	sampleKeep  = 14 * 24 * time.Hour
	trendSpan   = 24 * time.Hour // a trend over less is noise
	trendLeast  = 12             // samples
)

// addSample appends a sample when the last one is old enough, and drops what is too old or, after a clock jump, lies in the future.
func addSample(trend []Sample, now time.Time, used int64) []Sample {
	var kept []Sample
	for _, s := range trend {
		if s.At.After(now.Add(-sampleKeep)) && !s.At.After(now) {
			kept = append(kept, s)
		}
	}
	if len(kept) > 0 && now.Sub(kept[len(kept)-1].At) < sampleEvery {
		return kept
	}
	return append(kept, Sample{At: now, Used: used})
}

// daysUntilFull fits a line through the samples (least squares) and follows it to the SR's size. It is false when there are too few samples, or when use does not
// grow, or when it would take longer than ten years.
func daysUntilFull(now time.Time, sr SR) (float64, bool) {
	t := sr.Past.Trend
	if len(t) < trendLeast || t[len(t)-1].At.Sub(t[0].At) < trendSpan || sr.Past.Good == nil {
		return 0, false
	}
	const day = float64(24 * time.Hour)
	var n, sx, sy, sxx, sxy float64
	for _, s := range t {
		x, y := float64(s.At.Sub(t[0].At))/day, float64(s.Used)
		n, sx, sy, sxx, sxy = n+1, sx+x, sy+y, sxx+x*x, sxy+x*y
	}
	slope := (n*sxy - sx*sy) / (n*sxx - sx*sx) // bytes per day
	left := float64(sr.Past.Good.Physical - sr.Past.Good.Utilisation)
	days := left / slope
	if !(slope > 0) || days > 3650 {
		return 0, false
	}
	return max(days, 0), true
}
